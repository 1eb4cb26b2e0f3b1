"""MLflow as deploy/compose starts it, on a real Postgres and an S3 server: a run arrives, and outlives the server."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from cluster.mlflow_copy import sync
from configs.load import load
from data_pipelines.storage import Store
from tests.cluster.test_mlflow_copy import RECIPE
from tests.deploy.tools import DEPLOY
from trainer.pictures import encode_png
from trainer.record import RunRecord

POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
REMEDY = "Debian: apt-get install postgresql"
START_S = 90.0

pytestmark = [
    pytest.mark.daemon,
    pytest.mark.skipif(POSTGRES is None, reason=f"needs Postgres ({REMEDY})"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def as_postgres() -> dict[str, Any]:
    """Postgres refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """Port of a server on loopback, with an empty database mlflow of the user mlflow, whose password is secret."""
    assert POSTGRES is not None
    folder, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    identity = as_postgres()
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        (folder / "password").write_text("secret\n")
        (folder / "password").chmod(0o644)
        made = ["initdb", "--username=mlflow", f"--pwfile={folder}/password", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run([POSTGRES / made[0], *made[1:], f"{folder}/data"], check=True, capture_output=True, **identity)
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen(
                [POSTGRES / "postgres", "-D", f"{folder}/data", *options.split()], stdout=log, stderr=log, **identity
            )
        try:
            _wait_for_port(port, server, folder / "log")
            _ask(port, "postgres", "CREATE DATABASE mlflow")
            yield port
        finally:
            _end(server)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server", reason="moto is in the dev extra")
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@contextlib.contextmanager
def mlflow_server(postgres: int, s3: str, port: int, folder: Path) -> Iterator[psutil.Process]:
    """The server of the compose file: its own command, with this machine's addresses in the place of its services'."""
    service = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())["services"]["mlflow"]
    (command,) = service["command"]
    environment = dict(service["environment"])
    assert (
        "$$(cat /run/secrets/postgres_password)" in command and environment["AWS_ENDPOINT_URL_S3"] == "http://s3:8333"
    )
    command = command.replace("$$(cat /run/secrets/postgres_password)", "secret")
    command = command.replace("postgres:5432", f"127.0.0.1:{postgres}").replace("--host 0.0.0.0", "--host 127.0.0.1")
    command = re.sub(r"\b5000\b", str(port), command)
    command = command.replace("exec mlflow ", f"exec {shlex.quote(sys.executable)} -m mlflow ")
    environment |= {name: s3 for name, value in environment.items() if value == "http://s3:8333"}
    del environment["AWS_SHARED_CREDENTIALS_FILE"]
    environment |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "mlflow.log", "ab") as log:
        server = subprocess.Popen(
            ["/bin/sh", "-c", command], env=os.environ | environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "mlflow.log").read_text()[-4000:]
            time.sleep(0.2)
        yield psutil.Process(server.pid)
    finally:
        _end(server)


def test_a_run_arrives_in_postgres_and_s3_and_outlives_the_server(
    postgres: int, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    bucket = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    bucket.create_bucket(Bucket="mlflow")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    record = RunRecord.create(Store(str(tmp_path / "runs")), load(RECIPE))
    record.next_attempt()
    record.event("started", step=0)
    for step in range(1, 1201):
        record.metrics(step, {"loss": 1.0 / step})
    picture = encode_png(np.zeros((2, 3), np.uint8))
    record.picture(10, "slices", picture)
    record.flush()

    with mlflow_server(postgres, s3, port, tmp_path) as server:
        run_id = sync(record)
        rows = _ask(postgres, "mlflow", f"SELECT step, value FROM metrics WHERE run_uuid = '{run_id}' AND key = 'loss'")
        assert sorted(rows) == [(step, 1.0 / step) for step in range(1, 1201)]
        objects = {each["Key"]: each["Key"] for each in bucket.list_objects_v2(Bucket="mlflow")["Contents"]}
        (key,) = [key for key in objects if key.endswith("slices.png")]
        assert bucket.get_object(Bucket="mlflow", Key=key)["Body"].read() == picture
        for process in [server, *server.children(recursive=True)]:
            process.kill()

    record.metrics(1201, {"loss": 0.5})
    record.event("finished")
    record.close()
    with mlflow_server(postgres, s3, port, tmp_path):
        assert sync(record) == run_id, "it is the same run"
        ((count,),) = _ask(postgres, "mlflow", f"SELECT count(*) FROM metrics WHERE run_uuid = '{run_id}'")
        ((status,),) = _ask(postgres, "mlflow", f"SELECT status FROM runs WHERE run_uuid = '{run_id}'")
        assert (count, status) == (1201, "FINISHED")


def _ask(port: int, database: str, statement: str) -> list[tuple[Any, ...]]:
    import psycopg2

    connection = psycopg2.connect(
        host="127.0.0.1", port=port, user="mlflow", password="secret", dbname=database, connect_timeout=10
    )
    connection.autocommit = True  # a database is not created within a transaction
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def _wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
    server.wait()
