"""The worked examples of docs/extend.md, used as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
FILE = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GUESSING = 5 / 12**0.5  # the standard deviation of a frequency between 1 and 6


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the files of the page."""
    for name, content in FILE.findall((ROOT / "docs/extend.md").read_text()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def shardyard(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "500"}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.ray
@pytest.mark.distributed
def test_the_example_trains_as_the_page_says(project: Path) -> None:
    assert sorted(path.name for path in project.rglob("*.*")) == ["siren.py", "source.py", "task.py", "tones.yaml"]
    ended = shardyard(project, "train", "tones.yaml")
    assert ended.returncode == 0, ended.stderr
    rmse = RunRecord.open(str(project / "runs"), "tones").stitched()[-1]["validation/rmse"]
    assert rmse < GUESSING / 3


def test_a_model_that_does_not_fit_is_refused_with_those_that_do(project: Path) -> None:
    page = (ROOT / "docs/extend.md").read_text()
    shown = re.search(r"^```text\n(.*)\n```$", page, re.MULTILINE)
    assert shown is not None
    recipe = project / "tones.yaml"
    misfit = "model: {name: gpt, num_layers: 1, hidden_size: 8, num_heads: 1}"
    recipe.write_text(re.sub(r"^model:.*", misfit, recipe.read_text(), flags=re.MULTILINE))
    ended = shardyard(project, "check", "tones.yaml")
    assert ended.returncode == 2
    said, fits = ended.stderr.split("Models that fit: ")
    expected, _ = shown[1].split("Models that fit: ")
    assert expected in said
    assert "mlp" in fits
