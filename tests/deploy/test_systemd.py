"""deploy/systemd: units that systemd reads without a word, and that leave little to an intruder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, files, named, program, run

UNITS = files("systemd/*.service")
every_unit = pytest.mark.parametrize("unit", UNITS, ids=map(named, UNITS))


@every_unit
def test_what_a_unit_names_is_there(unit: Path) -> None:
    """Its environment file and the variables that it takes of it; secrets are credentials."""
    text = unit.read_text()
    (file,) = re.findall(r"^EnvironmentFile=/etc/shardyard/(\S+)$", text, re.MULTILINE)
    given = set(re.findall(r"^([A-Z_]+)=", (DEPLOY / "systemd" / file).read_text(), re.MULTILINE))
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    used = {first or second for first, second in re.findall(r"\$\{([A-Z_]+)\}|(?<!\$)\$([A-Z_]+)", command)}
    assert used == given - {"AWS_SHARED_CREDENTIALS_FILE"}
    credentials = set(re.findall(r"^LoadCredential=(\w+):/etc/shardyard/\1$", text, re.MULTILINE))
    assert credentials and credentials == set(re.findall(r"%d/(\w+)", text))
    assert re.search(r"^User=shardyard$", text, re.MULTILINE)


def test_options_of_the_metrics_service_parse() -> None:
    from cluster.cli import build_parser

    text = (DEPLOY / "systemd/shardyard-metrics.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+/shardyard (.*)$", text, re.MULTILINE)
    given = dict(re.findall(r"^([A-Z_]+)=(.*)$", (DEPLOY / "systemd/metrics.env").read_text(), re.MULTILINE))
    asked = build_parser().parse_args(re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], command).split())
    assert (asked.store, asked.host, asked.port, asked.token_file) == (
        "/shared/runs",
        "127.0.0.1",
        9871,
        "%d/metrics_token",
    )


@pytest.fixture
def startable(tmp_path: Path) -> list[Path]:
    """The units with programs that are on this machine: systemd looks for them."""
    copies = []
    for unit in UNITS:
        copy = tmp_path / unit.name
        copy.write_text(re.sub(r"/opt/shardyard/bin/\w+", "/bin/true", unit.read_text()))
        copies.append(copy)
    return copies


@pytest.mark.daemon
def test_systemd_reads_them_without_a_word(startable: list[Path]) -> None:
    analyze = program("systemd-analyze", "Debian: apt-get install systemd")
    assert run(analyze, "verify", "--man=no", *startable) == ""


@pytest.mark.daemon
def test_systemd_finds_little_exposed(startable: list[Path]) -> None:
    analyze = program("systemd-analyze", "Debian: apt-get install systemd")
    run(analyze, "security", "--offline=true", "--threshold=20", *startable)  # 2.0 of 10
