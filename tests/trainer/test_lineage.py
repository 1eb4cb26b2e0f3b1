from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import lineage
from trainer.redact import REDACTED, Redactor, is_secret_name


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "settings.py").write_text("rate = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_commit_and_uncommitted_changes_are_kept(repository: Path) -> None:
    (repository / "settings.py").write_text("rate = 2\n")
    (repository / "new file.py").write_text("")
    (repository / "below").mkdir()
    state = lineage.git_state(repository / "below")
    assert len(state["commit"]) == 40 and state["problem"] is None
    assert "-rate = 1" in state["diff"] and "+rate = 2" in state["diff"]
    assert state["untracked"] == ["new file.py"]


def test_no_secret_of_diff_command_or_environment_is_kept(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://me:canary1@host/repository.git")
    (repository / "settings.py").write_text(
        'API_KEY = "canary2"\npassword: canary3\nurl = "postgres://u:canary4@host/db"\n'
        "-----BEGIN RSA PRIVATE KEY-----\ncanary5\ncanary6\n-----END RSA PRIVATE KEY-----\n"
        "print('canary-value-of-variable')\naws = 'AKIACANARYCANARY0000'\nheader = 'Bearer canary-bearer'\n"
        'config = {"client_secret": "canary7", "rate": 3}\n'
    )
    environ = {"MLFLOW_TRACKING_PASSWORD": "canary-mlflow", "AWS_SECRET_ACCESS_KEY": "canary-value-of-variable"}
    argv = ["train", "--token", "canary8", "--api-key=canary9", "data.password=canary10", "steps=3", "canary-mlflow"]
    collected = lineage.collect(argv, environ, repository)
    text = json.dumps(collected)
    assert "canary" not in text.lower()
    assert "steps=3" in collected["command"] and "rate" in collected["git"]["diff"]
    assert collected["environment"]["AWS_SECRET_ACCESS_KEY"] == REDACTED


def test_it_is_collected_without_git(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    collected = lineage.collect(["train"], {}, repository)
    assert collected["git"]["commit"] is None and "git is not installed" in collected["git"]["problem"]
    assert collected["packages"]["numpy"] and collected["python"]


def test_a_folder_without_repository_or_commit_is_no_error(tmp_path: Path) -> None:
    assert "not a git repository" in lineage.git_state(tmp_path)["problem"]
    git(tmp_path, "init", "-q")
    state = lineage.git_state(tmp_path)
    assert state["commit"] is None and state["problem"]
    assert lineage.git_state(tmp_path / "gone")["commit"] is None


def test_a_huge_diff_is_cut_and_binary_files_are_named(repository: Path) -> None:
    (repository / "settings.py").write_text("x = 1\n" * 400_000)
    state = lineage.git_state(repository)
    assert len(state["diff"]) == 1_000_000 and "was cut" in state["problem"]
    (repository / "settings.py").write_bytes(bytes(range(256)) * 10)
    assert "Binary files" in lineage.git_state(repository)["diff"]


@pytest.mark.parametrize(
    "name",
    (
        "password",
        "DB_PASSWORD",
        "--api-key",
        "apiKey",
        "HF_TOKEN",
        "token",
        "authToken",
        "client_secret",
        "privateKey",
        "aws_secret_access_key",
        "data.credentials",
        "MLFLOW_TRACKING_TOKEN",
        "AZURE_ACCOUNT_KEY",
    ),
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    (
        "tokenizer",
        "sample_tokens",
        "tokens_per_s",
        "eos_token",
        "eos_token_id",
        "max_tokens",
        "key",
        "num_kv_heads",
        "RAY_AUTH_TOKEN_PATH",
        "keep",
        "monkey",
        "author",
        "secretary",
        "PWD",
        "OLDPWD",
        "pad_token",
        "sort_key",
    ),
)
def test_harmless_names(name: str) -> None:
    assert not is_secret_name(name)


def test_a_config_without_secrets_stays_as_it_is() -> None:
    config = {
        "name": "demo",
        "store": "s3://bucket/runs?region=eu-west-1",
        "task": {"name": "language_modeling", "tokenizer": {"name": "bpe", "vocab_size": 4096}},
        "evaluation": {"sample_tokens": 128, "every": None},
        "betas": (0.9, 0.95),
        "mlflow": "http://127.0.0.1:5000",
    }
    assert Redactor({}).value(config) == config


@given(st.text())
def test_any_text_can_be_redacted_twice(text: str) -> None:
    redactor = Redactor({"A_TOKEN": "abcdefgh"})
    once = redactor.text(text)
    assert redactor.text(once) == once
