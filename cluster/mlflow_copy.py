"""MLflow's faithful copy of a run: a thread in the launcher reads the run's record and sends what is new.

Training never meets MLflow. The workers write the record; this thread, in another process, follows it a few seconds
behind. While MLflow is out of reach nothing happens but that the copy falls behind; it catches up when MLflow answers,
in the next launch of the run, or by `shardyard runs sync`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import threading
from pathlib import Path

from cluster.mlflow_pass import CopyPass, sqlite_file
from cluster.mlflow_values import POSITION_FILE
from configs.errors import Unreachable, UsageError
from trainer.record import RunRecord
from trainer.redact import Redactor

_POLL_EVERY_S = 5.0
_LONGEST_PAUSE_S = 60.0
_UI_PORT = 5000


def tracking_uri(record: RunRecord) -> str | None:
    """Where the copy of a run goes; None if `tracking.mlflow` is null.

    "auto" is the address in MLFLOW_TRACKING_URI if set, else a sqlite file in the store (for a store that is not
    local: in the current folder).
    """
    uri = record.config.tracking.mlflow
    if uri != "auto":
        return uri
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    folder = record.store.local_path()
    file = (folder.parent if folder is not None else Path.cwd()) / "mlflow.db"
    return f"sqlite:///{file}"


class MlflowCopy:
    """Follows one run's record until `drain`. Nothing here raises into the launcher.

    last_error: why the latest pass failed, None after a good one.
    """

    def __init__(self, record: RunRecord, *, poll_every_s: float = _POLL_EVERY_S) -> None:
        self.last_error: str | None = None
        self._record = record
        self._uri = tracking_uri(record)
        self._poll_every_s = poll_every_s
        self._copier: CopyPass | None = None
        self._draining = threading.Event()
        self._abandoned = threading.Event()
        self._up_to_date = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-copy", daemon=True)

    def start(self) -> None:
        """Begin to copy, from where the last launch stopped. Does nothing if `tracking.mlflow` is null."""
        if self._uri is not None:
            self._thread.start()

    def drain(self, timeout_s: float = 30.0) -> bool:
        """Copy what there is now, and end; False if something is left for `shardyard runs sync`.

        Call it once the run's last event is written and its record is closed.
        """
        if not self._thread.is_alive():
            return self._uri is None or self._up_to_date
        self._draining.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        return self._up_to_date

    def _follow(self) -> None:
        failures = 0
        while True:
            last = self._draining.is_set()
            failures = 0 if self._copy_once() else failures + 1
            if last:
                self._up_to_date = failures == 0
                return
            pause_s = self._poll_every_s * 2 ** min(failures, 10)  # a float knows no 2**1024
            self._draining.wait(min(pause_s, _LONGEST_PAUSE_S))

    def _copy_once(self) -> bool:
        assert self._uri is not None
        try:
            if self._copier is None:
                experiment = self._record.config.tracking.experiment
                self._copier = CopyPass(self._record, self._uri, experiment)
            self._copier.copy()
        except Exception as error:  # whatever MLflow raises, the run goes on
            if self.last_error is None:
                self._say(
                    f"MLflow at {_shown(self._uri)} does not answer ({_cause(error)}). Training goes on; it is sent "
                    "later."
                )
            self.last_error = _cause(error)
            return False
        if self.last_error is not None:
            self._say("MLflow answers again; what it missed was sent.")
            self.last_error = None
        return True

    def _say(self, text: str) -> None:
        if not self._abandoned.is_set():
            print(text, file=sys.stderr, flush=True)


def sync(record: RunRecord) -> str:
    """Send what MLflow lacks of a run, now; returns MLflow's id of the run.

    Raises:
        UsageError: the run's `tracking.mlflow` is null. Unreachable: MLflow does not answer, or refuses.
    """
    uri = tracking_uri(record)
    if uri is None:
        raise UsageError(f"Run '{record.name}' has tracking.mlflow = null, so it is not copied to MLflow.")
    try:
        copier = CopyPass(record, uri, record.config.tracking.experiment)
        copier.copy()
    except Exception as error:
        raise Unreachable(
            f"Run '{record.name}' could not be copied to MLflow at {_shown(uri)}: {_cause(error)}. Start that server "
            f"and sync again. If its run was deleted there, delete {record.store.path(POSITION_FILE)} to send it anew."
        ) from error
    assert copier.run_id is not None
    return copier.run_id


def ui_command(record: RunRecord) -> str | None:
    """The command that opens the run's experiment in MLflow; None if `tracking.mlflow` is null.

    For a store in a database it starts MLflow's pages on a free port; for a server it opens the page in a browser.
    """
    uri = tracking_uri(record)
    if uri is None:
        return None
    if uri.startswith(("http://", "https://")):
        return f"python -m webbrowser {shlex.quote(_shown(uri).rstrip('/') + '/#/' + _experiment_path(record))}"
    beside = Path(sys.executable).parent / "mlflow"
    on_path = shutil.which("mlflow")
    program = "mlflow" if on_path and (not beside.exists() or Path(on_path).samefile(beside)) else str(beside)
    shown = f"sqlite:///{sqlite_file(uri)}" if sqlite_file(uri) is not None else uri
    # Without job execution the server takes 0.4 GB of memory instead of 1.2 GB.
    return (
        "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "
        f"{shlex.quote(program)} ui --backend-store-uri {shlex.quote(shown)} --port {_free_port(_UI_PORT)}"
    )


def ui_page(record: RunRecord, base: str = f"http://127.0.0.1:{_UI_PORT}") -> str:
    """The address of the run's page under a running MLflow."""
    return f"{base.rstrip('/')}/#/{_experiment_path(record)}"


def _experiment_path(record: RunRecord) -> str:
    if not record.store.exists(POSITION_FILE):
        return "experiments"
    position = json.loads(record.store.read_text(POSITION_FILE))
    if position["run_id"] is None:
        return "experiments"
    return f"experiments/{position['experiment_id']}/runs/{position['run_id']}?workflowType=machine_learning"


def _free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return first


def _cause(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return _shown(text.splitlines()[0])[:300].rstrip(".")


def _shown(text: str) -> str:
    """Without a password in an address."""
    return Redactor(os.environ).text(text)
