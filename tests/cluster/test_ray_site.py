"""What tests of the Ray target rely on: no trace of the site is left, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cluster import ray_site
from tests.cluster.namespaces import links_of
from tests.cluster.ray_site import ROOT, RaySite, missing
from tests.cluster.waiting import mentioning, wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no hosts here: {missing()}")]


def assert_nothing_left(folder: Path, owner: int, links: list[str]) -> None:
    wait_for(lambda: not mentioning(str(folder)), "the end of its processes")
    wait_for(lambda: links_of(owner) == links, "the end of its link")
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    assert not list(Path("/mnt").glob("session_*")), "its files are in its folder"


def test_nothing_is_left(tmp_path: Path) -> None:
    before = links_of(os.getpid())
    with RaySite(tmp_path):
        assert len(mentioning(str(tmp_path))) >= 3 and links_of(os.getpid()) != before
    assert_nothing_left(tmp_path, os.getpid(), before)


def test_nothing_is_left_of_a_start_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = links_of(os.getpid())
    monkeypatch.setattr(ray_site, "DAEMON", "{ray} start --no-such-option={name}{folder}{address}{options}\n")
    monkeypatch.setattr(ray_site, "START_S", 5.0)
    with pytest.raises(AssertionError, match="the head did not happen") as raised, RaySite(tmp_path):
        pass
    assert "no-such-option" in "".join(raised.value.__notes__)
    assert_nothing_left(tmp_path, os.getpid(), before)


def test_nothing_is_left_when_the_test_itself_is_killed(tmp_path: Path) -> None:
    code = f"""
        import pathlib, time
        from tests.cluster.ray_site import RaySite
        with RaySite(pathlib.Path({str(tmp_path)!r})):
            print("up", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == "up\n"
            assert links_of(owner.pid)
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
    assert_nothing_left(tmp_path, owner.pid, [])
