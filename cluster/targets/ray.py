"""A Ray cluster that is there already, by its Jobs API.

The job carries the code and the config: the four packages, the modules that the recipe names, and `run.yaml` are the
job's working directory, on every node. The cluster has the packages that Shardyard needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.commands.output import age
from cluster.ray_cluster import knock
from cluster.targets import Job, Queued, Status, same_store
from cluster.targets.ray_dashboard import open_client, queue_table, refuse_too_much
from configs.errors import Unreachable, UsageError
from configs.targets import RayTarget

PACKAGES = ("configs", "data_pipelines", "trainer", "cluster")
# exec: where nobody reaps orphans, as in many containers, Ray would wait for the shell's for ever when it stops a job.
PROGRAM = "exec python -m cluster.targets.ray_job"
# Ray kills a job that it is told to stop after 3 s otherwise: too soon for a save.
STOP_WAIT_S = 300
AGENT_WAIT_S = 5.0
_STATES = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class Target:
    """See cluster/targets/__init__.py."""

    def __init__(self, settings: RayTarget) -> None:
        self._address = settings.address

    def render(self, job: Job) -> str:
        """The request, and run.yaml."""
        request = self._request(job, f"{job.run}-XXXXXXXX")
        request["runtime_env"]["working_dir"] = [*PACKAGES, *map(str, _own_modules(job)), "run.yaml"]
        return f"POST {self._address}/api/jobs/\n{json.dumps(request, indent=2)}\n\n# run.yaml\n{job.recipe}"

    def submit(self, job: Job) -> str:
        """Upload the code and the config, and queue the launcher."""
        with self._client() as client, tempfile.TemporaryDirectory(prefix="shardyard-job-") as folder:
            refuse_too_much(client, job.resolved.config.resources)
            _fill(Path(folder), job)
            request = self._request(job, f"{job.run}-{os.urandom(4).hex()}")
            request["runtime_env"]["working_dir"] = folder
            deadline = time.monotonic() + AGENT_WAIT_S
            while True:
                try:
                    return str(client.submit_job(**request))
                except RuntimeError as error:  # a head that has just started
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1)

    def find(self, run: str, store: str) -> str | None:
        """The run's job that has not ended."""
        with self._client() as client:
            for details in client.list_jobs():
                labels = details.metadata or {}
                mine = labels.get("shardyard.run") == run and same_store(labels["shardyard.store"], store)
                if mine and details.submission_id and _STATES[details.status.value] in ("pending", "running"):
                    found: str = details.submission_id
                    return found
        return None

    def status(self, job_id: str) -> Status:
        """As the cluster tells it; Ray names no exit code of a job that succeeded."""
        with self._client() as client:
            try:
                details = client.get_job_info(job_id)
            except RuntimeError as error:
                if "does not exist" in str(error):
                    return Status("gone", f"the cluster at {self._address} knows no job {job_id}")
                raise
            state = _STATES[details.status.value]
            rows = queue_table(client) if state == "running" else []
        for row in rows:
            if row["job"] == job_id and row["state"] == "waiting":
                return Status("pending", f"{row['position']} in the queue: {row['why']}{_may_start(row['may_start'])}")
        code = 0 if state == "finished" else details.driver_exit_code
        reason = (details.message or "").partition(", last available logs")[0]  # they are in logs(), too
        return Status(state, reason, code)  # type: ignore[arg-type]

    def why_pending(self, job_id: str) -> str:
        """The queue's reason."""
        return self.status(job_id).reason

    def queue(self) -> list[Queued]:
        """As the cluster's queue published it last."""
        with self._client() as client:
            rows = queue_table(client)
        return [Queued(**row) for row in rows]

    def logs(self, job_id: str) -> str:
        """Asked for anew each time, since a stream of them can end before the job does."""
        with self._client() as client:
            text: str = client.get_job_logs(job_id)
        return text

    def stop(self, job_id: str) -> None:
        """SIGTERM to the launcher, which saves."""
        with self._client() as client:
            client.stop_job(job_id)

    def _request(self, job: Job, job_id: str) -> dict[str, Any]:
        config = job.resolved.config
        expected = "" if job.expected_s is None else f" --expected-s {job.expected_s:.0f}"
        seat = f"--user {shlex.quote(job.user)} --priority {job.priority} --submitted-at {time.time():.3f}{expected}"
        return {
            "submission_id": job_id,
            "entrypoint": f"{PROGRAM} {job_id} {seat}",
            "metadata": {"shardyard.run": config.name, "shardyard.store": config.store},
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
        }

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """A client, whose errors become ours."""
        from ray.exceptions import AuthenticationError

        parts = urlsplit(self._address)
        try:
            knock(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            yield open_client(self._address)
        except (ConnectionError, OSError) as error:
            raise Unreachable(
                f"No Ray dashboard answers at {self._address}: {_first_line(error)} Is the address that of the head's "
                "dashboard (port 8265), and was the head started with --dashboard-host 0.0.0.0, or is there a tunnel?"
            ) from error
        except AuthenticationError as error:
            said = _first_line(error).partition(". ")[0]
            raise Unreachable(
                f"The Ray cluster at {self._address} refuses us: {said}. Set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
            ) from error
        except RuntimeError as error:
            said = _first_line(error)
            if "No available agent" in said:
                raise Unreachable(
                    f"The Ray cluster at {self._address} has a dashboard, but no agent that starts jobs: see "
                    "dashboard_agent.log in the logs of its head. Often its port, 52365, is taken; another one is "
                    "given with `ray start --dashboard-agent-listen-port`."
                ) from error
            raise UsageError(f"The Ray cluster at {self._address} refuses the job: {said}") from error


def _fill(folder: Path, job: Job) -> None:
    """Put what the launcher and its workers import, and the config, into the job's working directory."""
    project = Path(__file__).resolve().parents[2]
    for path in [*(project / package for package in PACKAGES), *_own_modules(job)]:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    (folder / "run.yaml").write_text(job.recipe, encoding="utf-8")


def _own_modules(job: Job) -> list[Path]:
    """Files and packages of the user's that the recipe names, less what is installed."""
    config, installed = job.resolved.config, sysconfig.get_path("purelib")
    found = []
    for name in (config.task.name, config.model.name, config.data.name):
        spec = importlib.util.find_spec(name.partition(".")[0]) if "." in name else None
        if spec is not None:  # a package, with or without an __init__.py, has folders; a module has a file alone
            paths = spec.submodule_search_locations or filter(None, [spec.origin])
            found += [Path(path) for path in paths if not path.startswith(installed)]
    return sorted(set(found))


def _may_start(may_start: float | None) -> str:
    return "" if may_start is None else f"; it may start in {age(max(0.0, may_start - time.time()))}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
