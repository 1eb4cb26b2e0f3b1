"""Saves into an S3 server that dies, refuses, resets or stalls at any request that changes something; and loads."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest

from configs.errors import Unreachable
from configs.schema import CheckpointConfig
from data_pipelines import file_systems
from data_pipelines.storage import Store
from tests.crash.object_store import (
    ATTEMPTS,
    Case,
    Result,
    Run,
    Server,
    count_requests,
    load_cases,
    outcomes_of,
    prefixes,
    s3_server,
    save_case,
    save_cases,
)
from tests.crash.outcomes import GOOD, NAMED
from tests.crash.own_saves import load_from
from tests.crash.store_proxy import FAULTS, REFUSED, RESET_DONE, STALLED, TRUNCATED, StoreProxy
from trainer.checkpoint_folder import Retention

pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")

MANIFEST_PUT = 3  # of the writes of a save, after the tensors and the part
FOR_EVER = math.inf


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is made once, and silence ends it after 3 s, where it takes a minute otherwise."""
    monkeypatch.setattr(file_systems, "_SILENCE_S", 3.0)
    monkeypatch.setattr(file_systems, "_TRIES", 1)


@pytest.fixture
def proxy(server: Server) -> Iterator[StoreProxy]:
    with StoreProxy(server.host, server.port) as running:
        yield running


def assert_as_promised(results: list[Result], allowed: tuple[str, ...] = (GOOD,)) -> None:
    for result in results:
        assert result.met and result.outcome in allowed and not result.wrong, f"{result.case}: {result}"


# --- a process that dies


def test_a_save_may_die_after_any_request(server: Server) -> None:
    """And with it those that make a step's checkpoint anew, and those that delete the oldest."""
    states = prefixes(server)
    assert len(states) > 35
    for state, outcome, found in outcomes_of(server, states[len(states) - 20 :: 3]):
        assert outcome == GOOD, f"after {state.last}: {found}"


@pytest.mark.slow
def test_a_save_may_die_after_every_request(server: Server) -> None:
    assert {outcome for _, outcome, _ in outcomes_of(server, prefixes(server, ATTEMPTS))} == {GOOD}


# --- saves


def test_a_fault_in_passing_is_made_up_for(server: Server) -> None:
    """By further tries, also of what was done and not acknowledged."""
    results = save_cases(server, [Case(REFUSED, 1), Case(RESET_DONE, MANIFEST_PUT)])
    assert_as_promised(results)
    assert {result.error for result in results} == {None}


def test_a_save_that_fails_is_told_and_harms_no_other(server: Server, hasty: None) -> None:
    """Of a manifest that the store has, though it never said so, nothing is deleted."""
    faults = [(REFUSED, 1, FOR_EVER), (RESET_DONE, 2, FOR_EVER), (RESET_DONE, MANIFEST_PUT, 2)]  # and its look-up
    results = save_cases(server, [Case(*fault) for fault in faults])
    assert_as_promised(results)
    for result in results:
        assert result.error is not None and "Check the network" in result.error, result
        assert ("the next start finds it" in result.error) == (result.case.at == MANIFEST_PUT)


def test_a_manifest_that_was_not_acknowledged_but_arrived_is_a_checkpoint(server: Server, hasty: None) -> None:
    """One try: nobody makes the request again, and the store tells that it has it."""
    result = save_case(server, Case(RESET_DONE, MANIFEST_PUT))
    assert_as_promised([result])
    assert result.error is None


def test_training_goes_on_while_a_save_stalls(
    server: Server, proxy: StoreProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does what reads the store meanwhile; the save ends well once the store answers."""
    monkeypatch.setattr(file_systems, "_SILENCE_S", 30.0)
    run = Run(server, proxy.port)
    run.train()
    proxy.fail(STALLED, count=1)
    run.saver.save(run.step, run.engine, {})
    proxy.wait_for_fault()
    sent = proxy.requests[:]
    run.train()
    assert run.direct.child("step-00000002").list()
    assert proxy.requests == sent, "nobody has waited until the request was given up"
    assert proxy.mend() == 1
    run.saver.wait()
    assert run.saver.last_error is None
    found = load_from(run.direct)
    assert found.source == "step-00000003" and not found.told


@pytest.mark.slow
def test_a_fault_at_every_write(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In passing: all saves succeed."""
    monkeypatch.setattr(file_systems, "_SILENCE_S", 3.0)
    every = range(1, count_requests(server, reads=False) + 1)
    results = save_cases(server, [Case(fault, at) for fault, at in product(FAULTS, every)])
    assert_as_promised(results)
    assert {result.error for result in results} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, FOR_EVER])
def test_a_fault_at_every_write_of_one_try(server: Server, hasty: None, count: float) -> None:
    every = range(1, count_requests(server, reads=False) + 1)
    results = save_cases(server, [Case(fault, at, count) for fault, at in product(FAULTS, every)])
    assert_as_promised(results)
    before_the_manifest = [result for result in results if result.case.at < MANIFEST_PUT]
    assert all(result.error for result in before_the_manifest if result.case.fault != TRUNCATED)


def test_a_request_is_given_up_after_its_tries(server: Server, proxy: StoreProxy, hasty: None) -> None:
    proxy.fail(REFUSED, reads=True)
    with pytest.raises(Unreachable, match=r"Cannot list s3://.*SLOW_DOWN.*Check the network"):
        server.store("folder", proxy.port).list()
    assert proxy.mend() == 1


# --- loads


def test_a_store_out_of_reach_is_no_damage(server: Server, hasty: None) -> None:
    """An older checkpoint is not loaded for it; the error says where and what to do."""
    faults = [(REFUSED, 1), (REFUSED, 2), (REFUSED, 3), (REFUSED, 4), (REFUSED, 6), (STALLED, 2), (TRUNCATED, 1)]
    assert_as_promised(load_cases(server, [Case(fault, at, FOR_EVER) for fault, at in faults]), (NAMED,))


@pytest.mark.slow
def test_a_fault_at_every_read(server: Server, hasty: None) -> None:
    """For ever: the store is named. A HEAD has no answer to cut off, so there a load may end well."""
    every = range(1, count_requests(server, reads=True) + 1)
    results = load_cases(server, [Case(fault, at, FOR_EVER) for fault, at in product(FAULTS, every)])
    assert_as_promised([result for result in results if result.case.fault != TRUNCATED], (NAMED,))
    assert_as_promised([result for result in results if result.met], (NAMED, GOOD))


@pytest.mark.slow
def test_a_load_gets_over_a_fault_at_every_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "_SILENCE_S", 3.0)
    every = range(1, count_requests(server, reads=True) + 1)
    assert_as_promised(load_cases(server, [Case(fault, at) for fault, at in product(FAULTS, every)]))


def test_what_is_out_of_reach_is_not_pruned(server: Server, proxy: StoreProxy, hasty: None) -> None:
    """The best checkpoint stays, also where its manifest cannot be read."""
    run = Run(server, proxy.port)
    rule = CheckpointConfig.model_validate({"keep": 1, "keep_best": {"metric": "loss", "goal": "min", "count": 1}})
    for at in range(1, 20):
        proxy.fail(REFUSED, at=at, count=1, reads=True)
        try:
            assert Retention(run.store, rule).going() == []
        except Unreachable:
            assert proxy.mend() == 1
        else:
            assert proxy.mend() == 0 and at > 6
            return
    pytest.fail("no end of requests")


# --- the end of a process

SAVER = """
import sys
from data_pipelines import file_systems
from data_pipelines.storage import Store
file_systems._SILENCE_S, file_systems._TRIES = 1.0, 1
from configs.schema import CheckpointConfig
from tests.crash.object_store import WORLD, make_engine, train
from trainer.checkpoint import Checkpointer
from trainer.progress import Progress
saver = Checkpointer(Store(sys.argv[1]), WORLD, CheckpointConfig(), Progress())
engine = make_engine(WORLD, 0)
train(engine, 1)
print("ready", flush=True)
sys.stdin.readline()
saver.save(1, engine, {})
sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_stalled_save_keeps_no_process_alive(server: Server, proxy: StoreProxy) -> None:
    """Longer than its request may take."""
    folder: Store = server.new_store()
    uri = server.store(folder.path().rpartition("/")[2], proxy.port).uri
    command = [sys.executable, "-c", SAVER, uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None and saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        proxy.fail(STALLED)
        print(file=saver.stdin, flush=True)
        proxy.wait_for_fault()
        print(file=saver.stdin, flush=True)
        assert saver.wait(60) == 0
