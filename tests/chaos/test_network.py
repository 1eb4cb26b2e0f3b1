"""A cut network between two hosts: the run goes on with those that remain, and ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.hosts import HEAD, PORT, Hosts, allowed, two_hosts
from tests.chaos.runs import differing, recipe, state_of, train_undisturbed
from trainer.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(not allowed(), reason="needs root")]

STEPS, CUT_AFTER, END_S = 240, 20, 240.0  # so many that it cannot end before it is cut


def test_a_cut_network_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    changes = {"checkpoint": {"every": 15}, "determinism": "exact", "zero": {"stage": 1}}
    expected, settings = (recipe(tmp_path / name, STEPS) | changes for name in ("undisturbed", "cut"))
    train_undisturbed(expected)
    settings["resources"] = {"workers": 2, "min_workers": 1}
    settings["recovery"] = {"max_restarts": 3}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    with two_hosts() as hosts:
        cut_at = train_and_cut(hosts, path, settings["store"])
    record = RunRecord.open(settings["store"], "chaos")
    failed = next(event for event in record.events() if event["kind"] == "failed")
    assert failed["time"] - failed["killed_s"] - cut_at < 5.0, failed  # the event is written when all are killed
    sizes = [event["world_size"] for event in record.events() if event["kind"] == "started"]
    assert sizes == [2, 1]
    assert record.status() == "finished"
    assert differing(state_of(settings["store"], STEPS), state_of(expected["store"], STEPS)) == []


def train_and_cut(hosts: Hosts, recipe: Path, store: str) -> float:
    """Epoch seconds at which the network was cut, CUT_AFTER steps after the start."""
    command = [sys.executable, "-m", "cluster.cli", "train", str(recipe), "--address", f"{HEAD}:{PORT}"]
    launcher = hosts.popen(hosts.head, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + END_S
        while not steps_done(store) >= CUT_AFTER:
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < deadline, "it does not train"
            time.sleep(0.02)
        hosts.cut()
        cut_at = time.time()
        said, _ = launcher.communicate(timeout=END_S)
        assert launcher.returncode == 0, said
        return cut_at
    finally:
        launcher.kill()
        launcher.wait()


def steps_done(store: str) -> int:
    try:
        rows = RunRecord.open(store, "chaos").stitched()
    except Exception:  # it is not there yet
        return 0
    return int(rows[-1]["step"]) if rows else 0
