"""One launcher a run: the lease that the running one holds, renews, and gives back.

A store may be an object store, which offers no lock and no exclusive create, only that what was written is seen by the
next listing. So each contender writes a claim of its own in `lease/` and then lists the folder; it wins only if it
sees no other live claim. Of two contenders at least one listed after both had written, so two never win. Whoever sees
a contender with a smaller id withdraws, which lets exactly one through.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from configs.errors import NotFound, ShardyardError, UsageError
from data_pipelines.storage import Store

_FOLDER = "lease"
RENEW_EVERY_S = 5.0
STALE_AFTER_S = 30.0


@dataclass(frozen=True)
class Holder:
    """A process that launches a run. `process_started_at` tells it from a later one with the same pid."""

    host: str
    pid: int
    process_started_at: float

    @classmethod
    def this_process(cls) -> Holder:
        """The calling process."""
        import psutil

        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether it is known to be gone; of a process on another host nothing is known."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(process.create_time() - self.process_started_at) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True)
class Claim:
    """One file in `lease/`. Times are seconds since the epoch, so hosts' clocks must agree within a few seconds."""

    id: str
    holder: Holder
    held: bool
    since: float
    renewed_at: float

    def is_live(self) -> bool:
        """Whether its process may still be at work."""
        return time.time() - self.renewed_at <= STALE_AFTER_S and not self.holder.is_dead()

    @property
    def path(self) -> str:
        """Its file in the run's folder."""
        return f"{_FOLDER}/{self.id}.json"


class Lease:
    """The right to run, held by this process and renewed in a thread until `release()`. A context manager."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store = store
        self._claim = claim
        self._lost = threading.Event()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, store: Store, holder: Holder | None = None) -> Lease:
        """Take the lease of the run whose folder is `store`; a stale one is taken over.

        Raises:
            UsageError: a live process holds it.
        """
        now = time.time()
        claim = Claim(uuid.uuid4().hex, holder or Holder.this_process(), False, now, now)
        try:
            return cls(store, _contend(store, claim))
        except BaseException:
            with contextlib.suppress(ShardyardError):
                store.delete(claim.path)
            raise

    @property
    def lost(self) -> bool:
        """Whether another launcher took over, because this one was not heard of for 30 s. It must stop then."""
        return self._lost.is_set()

    def release(self) -> None:
        """Give the lease back; the next launcher is let in at once."""
        self._released.set()
        self._thread.join()
        self._store.delete(self._claim.path)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ShardyardError):  # it goes stale by itself, and must not hide how the run ended
            self.release()

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            # A store out of reach is tried again; whether the lease is lost shows when it answers.
            with contextlib.suppress(ShardyardError):
                if not self._renew():
                    self._lost.set()
                    return

    def _renew(self) -> bool:
        """Whether the lease is still ours."""
        later = any(claim.held and claim.since > self._claim.since for claim in _rivals(self._store, self._claim))
        if later or not self._store.exists(self._claim.path):
            self._store.delete(self._claim.path)
            return False
        self._claim = replace(self._claim, renewed_at=time.time())
        _write(self._store, self._claim)
        return True


def current_claim(store: Store) -> Claim | None:
    """The claim that holds the run's lease, live or stale (then its launcher died); None where nobody does."""
    held = [claim for claim in _claims(store) if claim.held]
    return max(held, key=lambda claim: (claim.is_live(), claim.since), default=None)


def _contend(store: Store, claim: Claim) -> Claim:
    """Win the lease or raise; returns the held claim."""
    claimed = False
    deadline = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < deadline:
        rivals = _rivals(store, claim)
        _refuse_if_held(store, rivals)
        if claimed and not rivals:
            return _hold(store, claim)
        if claimed and min(rival.id for rival in rivals) < claim.id:
            store.delete(claim.path)
            claimed = False
        elif not claimed and not rivals:
            claim = replace(claim, renewed_at=time.time())
            _write(store, claim)
            claimed = True
            continue  # list again at once: the first listing after the claim decides
        time.sleep(random.uniform(0.01, 0.05))
    raise UsageError(f"Run '{_run_name(store)}' is being launched by several processes at once. Launch it once.")


def _hold(store: Store, claim: Claim) -> Claim:
    held = replace(claim, held=True, renewed_at=time.time())
    _write(store, held)
    # A process that slept for long between its listing and now may find that it was given up for dead.
    _refuse_if_held(store, _rivals(store, held))
    for stale in _claims(store):
        if stale.id != held.id and not stale.is_live():
            store.delete(stale.path)
    return held


def _refuse_if_held(store: Store, rivals: list[Claim]) -> None:
    for claim in rivals:
        if claim.held:
            raise UsageError(
                f"Run '{_run_name(store)}' is already running on host {claim.holder.host}, pid {claim.holder.pid}, "
                f"since {_local_time(claim.since)}. Follow it with `shardyard logs {_run_name(store)}`, stop it with "
                f"`shardyard runs stop {_run_name(store)}`, or give the new run another name (name=...)."
            )


def _rivals(store: Store, claim: Claim) -> list[Claim]:
    return [other for other in _claims(store) if other.id != claim.id and other.is_live()]


def _claims(store: Store) -> list[Claim]:
    claims = []
    for name in store.list(_FOLDER):
        try:
            fields = json.loads(store.read_bytes(f"{_FOLDER}/{name}"))
            claims.append(Claim(**{**fields, "holder": Holder(**fields["holder"])}))
        except NotFound:  # withdrawn since the listing
            continue
        except (ValueError, TypeError, KeyError):  # no claim: not written by us
            continue
    return claims


def _write(store: Store, claim: Claim) -> None:
    store.write_atomic(claim.path, json.dumps(asdict(claim)).encode())


def _run_name(store: Store) -> str:
    return store.uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
