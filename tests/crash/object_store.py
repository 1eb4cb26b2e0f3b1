"""Checkpoints in an S3 server of this process, behind a proxy that fails; for tests and for the benchmark."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from configs.errors import Unreachable
from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.crash.disk import Call, Files
from tests.crash.outcomes import Expected, Loaded, classify
from tests.crash.own_saves import engine_digest, load_from, make_engine, reader_digest, train
from tests.crash.store_proxy import StoreProxy
from trainer.checkpoint import Checkpointer, newest
from trainer.progress import Progress

WORLD: Any = SimpleNamespace(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
ATTEMPTS = ((1, 2), (2, 3, 4))  # the steps that each attempt saves: the second makes the last of the first anew
_AT_ONCE = 16  # cases, which mostly wait
_names = itertools.count()


@dataclass(frozen=True)
class Server:
    """An S3 server with one bucket."""

    host: str
    port: int

    def store(self, path: str, port: int | None = None) -> Store:
        """A folder of the bucket; port: of a proxy."""
        query = f"endpoint_override={self.host}:{port or self.port}&scheme=http&region=us-east-1"
        return Store(f"s3://id:key@bucket/{path}?{query}&allow_bucket_creation=true")

    @cached_property
    def root(self) -> Store:
        """The bucket."""
        return self.store("")

    def new_store(self) -> Store:
        """An empty folder."""
        return self.root.child(f"folder-{next(_names)}")


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """A running server; `moto` is in the extra "dev"."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        server = Server(*running.get_host_and_port())
        server.root._remote[0].create_dir("bucket")
        yield server
    finally:
        running.stop()


def contents(store: Store) -> Files:
    """What a folder of this server's bucket holds, markers of folders too; asked for without requests."""
    inside = store.path().partition("bucket/")[2] + "/"
    found = {name: bytes(key.value) for name, key in _bucket().keys.items() if name.startswith(inside)}
    return {name.removeprefix(inside): content for name, content in found.items() if name != inside}


def fill(store: Store, files: Files) -> Store:
    """Make an empty folder of this server's bucket hold this."""
    for name, content in files.items():
        _backend().put_object("bucket", f"{store.path().partition('bucket/')[2]}/{name}", content)
    return store


def _backend() -> Any:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _bucket() -> Any:
    return _backend().buckets["bucket"]


# --- a process that dies


@dataclass(frozen=True)
class Prefix:
    """What the store holds when only the requests up to `last` arrived."""

    last: str
    files: Files
    expected: Expected


def prefixes(server: Server, attempts: Sequence[Sequence[int]] = ATTEMPTS) -> list[Prefix]:
    """Every state of the store while these steps are saved, keeping the newest two, and after each request."""
    direct, marks, states = server.new_store(), list[Call](), list[Prefix]()
    with StoreProxy(server.host, server.port) as proxy:

        def remember() -> None:
            states.append(Prefix(proxy.requests[-1], contents(direct), Expected.at(marks, len(marks))))

        def mark(word: str, digest: str) -> None:
            marks.append(Call("mark", data=json.dumps({word: digest}).encode()))

        proxy.after_write = remember
        for seed, steps in enumerate(attempts):
            store = server.store(direct.path().rpartition("/")[2], proxy.port)
            saver = Checkpointer(store, WORLD, CheckpointConfig(keep=2), Progress())
            engine = make_engine(WORLD, seed)
            for step in steps:
                train(engine, step)
                digest = engine_digest(engine, step)
                mark("begun", digest)
                saver.save(step, engine, {"examples_seen": step}, wait=True)
                assert saver.last_error is None, saver.last_error
                mark("saved", digest)
    return states


def outcomes_of(server: Server, states: Iterable[Prefix]) -> Iterator[tuple[Prefix, str, Loaded]]:
    """What a start finds in each state, and what that counts as."""
    for state in states:
        found = load_from(fill(server.new_store(), state.files))
        yield state, classify(found, state.expected, (), crash=True), found


# --- a store that fails


@dataclass(frozen=True)
class Case:
    """A save whose `at`-th write, or a load whose `at`-th read, meets `fault`, and so do the next, `count` in all."""

    fault: str
    at: int
    count: float = 1


@dataclass
class Result:
    """met: requests that met the fault. error: of the save or load. outcome: of what was found then.

    wrong: what was not as promised.
    """

    case: Case
    met: int = 0
    error: str | None = None
    outcome: str = ""
    wrong: list[str] = field(default_factory=list)


class Events:
    """What a Checkpointer uses of a run's record."""

    name, attempt = "run", 1
    config = SimpleNamespace(model_dump=lambda mode: {})

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.kinds.append(kind)

    def flush(self) -> None:
        pass


class Run:
    """A run that has saved steps 1 and 2, the first as the better, and keeps two checkpoints. port: of a proxy."""

    def __init__(self, server: Server, port: int | None = None) -> None:
        self.direct = server.new_store()
        self.store = self.through(server, port)
        self.events = Events()
        record: Any = self.events
        self.saver = Checkpointer(self.store, WORLD, CheckpointConfig(keep=2), Progress(), record)
        self.engine = make_engine(WORLD, seed=0)
        self.saved: list[str] = []
        self.step = 0
        for _ in range(2):
            self.train()
            assert self.save() is None, self.saver.last_error

    def through(self, server: Server, port: int | None) -> Store:
        """Its folder."""
        return server.store(self.direct.path().rpartition("/")[2], port)

    def train(self) -> None:
        """One step."""
        self.step += 1
        train(self.engine, self.step)

    def save(self) -> str | None:
        """Save; why that failed."""
        self.saver.save(self.step, self.engine, {}, {"evaluation": {"loss": self.step}}, wait=True)
        if self.saver.last_error is None:
            self.saved.append(engine_digest(self.engine, self.step))
        return self.saver.last_error


def save_cases(server: Server, cases: Sequence[Case]) -> list[Result]:
    """Many saves at a time, each of a run of its own."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda case: save_case(server, case), cases))


def save_case(server: Server, case: Case) -> Result:
    """A save that meets a fault; what is found then; the next save; and what is left."""
    with StoreProxy(server.host, server.port) as proxy:
        return _save(Run(server, proxy.port), proxy, case)


def _save(run: Run, proxy: StoreProxy, case: Case) -> Result:
    result = Result(case)
    run.train()
    begun = engine_digest(run.engine, run.step)
    proxy.fail(case.fault, at=case.at, count=case.count)
    result.error = run.save()
    result.met = proxy.mend()
    told: list[str] = []
    found = newest(run.direct, told.append)
    loaded = Loaded(None if found is None else reader_digest(found[1]), told)
    result.outcome = classify(
        loaded, Expected(tuple(run.saved), () if begun in run.saved else (begun,)), (), crash=True
    )
    if any("fails its" in text or "missing" in text or "bytes" in text for text in told):
        result.wrong.append(f"the save left a damaged checkpoint: {told}")
    if (result.error is not None) != ("checkpoint_failed" in run.events.kinds):
        result.wrong.append(f"the save says {result.error}, and the events are {run.events.kinds}")
    run.train()
    if (error := run.save()) is not None:
        result.wrong.append(f"the next save failed: {error}")
    elif (after := load_from(run.direct)).found != run.saved[-1] or after.told:
        result.wrong.append(f"the next save was not found: {after}")
    names = [path.rpartition("/")[2] for path in contents(run.direct) if not path.endswith("/")]
    if len(names) != 2 * names.count("manifest.json"):
        result.wrong.append(f"more is left than checkpoints: {names}")
    return result


def load_cases(server: Server, cases: Sequence[Case]) -> list[Result]:
    """Many loads at a time, all of one run."""
    run = Run(server)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda case: _load(server, run, case), cases))


def _load(server: Server, run: Run, case: Case) -> Result:
    result, told = Result(case), list[str]()
    with StoreProxy(server.host, server.port) as proxy:
        store = run.through(server, proxy.port)
        proxy.fail(case.fault, at=case.at, count=case.count, reads=True)
        try:
            found = newest(store, told.append)
            loaded = Loaded(None if found is None else reader_digest(found[1]), told)
        except Unreachable as error:
            loaded = Loaded(None, told, error=str(error))
            if not (store.path() in str(error) and "Check the network" in str(error)):
                result.wrong.append(f"the error says neither where nor what to do: {error}")
        result.met, result.error = proxy.mend(), loaded.error
    result.outcome = classify(loaded, Expected(tuple(run.saved), ()), [run.direct.path()], crash=True)
    if told:
        result.wrong.append(f"what is out of reach is told to be damaged: {told}")
    return result


def count_requests(server: Server, *, reads: bool) -> int:
    """How many writes a save makes that deletes the oldest checkpoint; or how many reads a load."""
    with StoreProxy(server.host, server.port) as proxy:
        run = Run(server, proxy.port)
        run.train()
        del proxy.requests[:]
        if reads:
            found = newest(run.store)
            assert found is not None and reader_digest(found[1]) == run.saved[-1]
        else:
            assert run.save() is None
        return sum((request.split()[0] in ("GET", "HEAD")) == reads for request in proxy.requests)
