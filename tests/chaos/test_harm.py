"""Harm a run at random; the weights must be those of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import drive, mlflow_pass, train
from cluster.embedded_ray import EmbeddedRay
from cluster.ray_cluster import import_paths
from configs.errors import RunFailed
from tests.chaos.harm import ENDINGS, OUTAGES, Harm, make_schedule, mend_shards, write_schedule
from tests.chaos.mlflow_outage import REQUEST_TIMEOUT_S, MlflowServer, Outage
from tests.chaos.runs import (
    RUN,
    SAVE_EVERY,
    WORKERS,
    LastingGroup,
    assert_each_once,
    curve_of,
    differing,
    examples_of,
    noted_steps,
    recipe,
    seeds,
    state_of,
    train_undisturbed,
)
from trainer.record import RunRecord

pytestmark = [pytest.mark.ray, pytest.mark.distributed, pytest.mark.daemon]

STEPS = 48
STOPPED_S = 3.0  # a stopped process begins no step for so long: less than the silence after which it is noticed
UNHARMED_GAP_S = 5.0  # between two steps beside an outage of MLflow: far more than a step, less than a timeout of 10 s


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of the run that nobody disturbs."""
    settings = recipe(tmp_path_factory.mktemp("undisturbed"), STEPS)
    train_undisturbed(settings)
    assert_each_once(examples_of(settings["store"]))
    return str(settings["store"])


@pytest.fixture(scope="module")
def group() -> Iterator[LastingGroup]:
    """Workers for all schedules of this file, in a Ray of their own."""
    before = children()
    embedded = EmbeddedRay(WORKERS, False, import_paths())
    group = LastingGroup()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drive, "RayWorkerGroup", group.serve)
            yield group
    finally:
        group.end()
        embedded.stop()
    assert not children() - before, "processes outlive the runs"


@pytest.fixture(scope="module")
def mlflow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer | None]:
    """A server for all schedules of this file; none for the short one of `make test`."""
    if request.config.getoption("--schedules") == 0:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_pass._ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
        server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
        yield server
        server.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each long schedule of `make chaos`; else one, of a short schedule."""
    metafunc.parametrize("seed", seeds(metafunc.config))


def test_no_harm_leaves_a_trace_in_the_weights(
    seed: int,
    tmp_path: Path,
    expected: str,
    group: LastingGroup,
    mlflow: MlflowServer | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = time.monotonic()
    settings = recipe(tmp_path, STEPS)
    store, chance = Path(settings["store"]), random.Random(seed)
    store.mkdir()
    kinds = chance.sample(list(ENDINGS), 3) if mlflow is None else [*ENDINGS, chance.choice(list(OUTAGES))]
    schedule = make_schedule(seed, kinds, workers=WORKERS, steps=STEPS, save_every=SAVE_EVERY, step_s=0.05)
    write_schedule(store, schedule)
    settings["recovery"] = {"max_restarts": len(schedule)}
    outage = None
    if mlflow is not None:
        settings["tracking"] = {"mlflow": mlflow.uri}
        outage = Outage(mlflow, store, next(harm for harm in schedule if harm.kind in OUTAGES))
        monkeypatch.setattr(drive, "MlflowCopy", outage.copy)

    summary = trained(settings, schedule)

    assert summary["outcome"] == "finished"
    assert group.training() == [], "processes outlive the run"
    prove_harms(settings["store"], schedule)
    assert differing(state_of(settings["store"], STEPS), state_of(expected, STEPS)) == []
    assert curve_of(settings["store"]) == curve_of(expected)
    assert examples_of(settings["store"]) == examples_of(expected)
    if outage is not None:
        outage.prove(RunRecord.open(settings["store"], RUN), curve_of(expected))
    order = ", ".join(f"{harm.kind} in step {harm.step + 1}" for harm in schedule)
    print(f"seed {seed}, {time.monotonic() - began:.1f} s: {order}", flush=True)


def trained(settings: dict[str, Any], schedule: list[Harm]) -> dict[str, Any]:
    """The run to its end; launched anew once its data is mended, where a harm makes it unreadable."""
    body = "tests.chaos.harm:train_until_harmed"
    if any(harm.kind == "corrupt_shard" for harm in schedule):
        with pytest.raises(RunFailed, match=r"\.arrow.* fails its (digest|checksum)"):
            train(settings, quiet=True, body=body).wait()
        assert mend_shards(Path(settings["store"])) > 0
    return train(settings, quiet=True, body=body).wait()


def prove_harms(store: str, schedule: list[Harm]) -> None:
    """Each harm fell between two steps of its attempt; those that end it made the next one repeat some, and were blamed
    on their rank; the others delayed no step.
    """
    events = RunRecord.open(store, RUN).events()
    starts = {event["attempt"]: event["step"] for event in events if event["kind"] == "started"}
    failures = {event["attempt"]: event for event in events if event["kind"] == "failed"}
    for harm in schedule:
        landed = json.loads((Path(store) / f"landed-{harm.kind}.json").read_text())
        assert starts[harm.attempt] < landed["step"] < STEPS, f"{landed} is not inside its attempt"
        if harm.kind in OUTAGES:
            begun = [each["time"] for each in noted_steps(store, harm.attempt, harm.rank)]
            before, after = (list(filter(later, begun)) for later in (landed["time"].__ge__, landed["time"].__lt__))
            assert before and after, f"{landed} is not between two steps"
            assert min(after) - max(before) < UNHARMED_GAP_S, f"{landed} delayed a step"
            continue
        if harm.kind == "stop":  # before it is killed it may end a step and save, while its stacks are written
            begun = [each["time"] - landed["time"] for each in noted_steps(store, harm.attempt, harm.rank)]
            assert min(begun) < 0 and not [each for each in begun if 0 < each < STOPPED_S], f"{landed} stopped nothing"
        else:
            resumed_at = min(starts[attempt] for attempt in starts if attempt > harm.attempt)
            assert resumed_at < landed["step"], f"{landed}, resumed at {resumed_at}, repeats nothing"
        blamed = failures[harm.attempt]
        assert blamed["rank"] == landed["rank"], f"{blamed} blames another rank than {landed}"
        assert blamed["cause"] == {"stop": "silent", "raise_error": "raised"}.get(harm.kind, "died"), blamed
    told = {"corrupt_newest": "checkpoint_damaged", "full_disk": "checkpoint_failed"}
    wanted = {told[harm.kind] for harm in schedule if harm.kind in told}
    kinds = {event["kind"] for event in events}
    assert wanted <= kinds, f"{kinds}"


def children() -> set[int]:
    """Processes below this one."""
    return {child.pid for child in psutil.Process().children(recursive=True)}
