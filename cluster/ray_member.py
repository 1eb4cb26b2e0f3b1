"""One worker as its group's driver knows it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.policies import State, WorkerStatus
from cluster.ray_cluster import death_of, raised_by
from cluster.ray_kill import Process
from configs.schema import ResourcesConfig


@dataclass(eq=False)
class Member:
    """An actor, the calls to it on their way, and what is known of it. Times are of this process's monotonic clock.

    slot: number of its place. where: what Worker.describe returned; empty until it did. warm: what Worker.warm did.
    progress: the latest answer to a ping. unanswered_s: time in which we listened, and it did not answer.
    """

    actor: Any
    slot: int
    where: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    state: State = "starting"
    error: str | None = None
    failed_at: float | None = None
    user_error: bool = False
    peer_failed: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    unanswered_s: float = 0.0
    pinged_at: float = 0.0
    ping_ref: Any = None
    train_ref: Any = None

    def again(self) -> Member:
        """The same worker for another attempt."""
        return Member(self.actor, self.slot, self.where, self.warm)

    def processes(self) -> list[Process]:
        """All of its processes that are known."""
        own = [self.where["process"]] if self.where else []
        return [*own, *self.warm.get("processes", []), *self.progress.get("processes", [])]

    def hear(self, progress: dict[str, Any]) -> None:
        """It answered a ping; one from before its end may be answered late."""
        self.unanswered_s = 0.0
        if self.state == "running":
            self.progress = {**self.progress, **progress}

    def end(self, result: dict[str, Any]) -> None:
        """Its training returned: finished, stopped, raised or died (see Worker.train)."""
        self.state = result["outcome"]
        self.progress = {**self.progress, **result}
        self.error = result.get("error")
        self.failed_at = result.get("failed_at")
        self.user_error = result.get("user_error", False)
        self.peer_failed = result.get("peer_failed", False)

    def bury(self, error: Exception) -> None:
        """A call to it failed: its process or its node is gone, or could not import what it was told to."""
        import ray

        if isinstance(error, ray.exceptions.RayTaskError):
            self.state, self.error, self.failed_at = "raised", raised_by(error), time.time()
        else:
            self.state, self.error = "died", death_of(error)
        self.user_error = "ModuleNotFoundError" in str(error)

    def status(self, rank: int) -> WorkerStatus:
        """What the controller is told."""
        node_unanswered_s = self.unanswered_s
        unanswered_s = node_unanswered_s + self.progress.get("unheard_s", 0.0)
        return WorkerStatus(
            rank=rank,
            node=str(self.where.get("node", "a node that did not answer")),
            state=self.state,
            log=self.log,
            phase=self.progress.get("phase", "starting"),
            step=self.progress.get("step", 0),
            steps=self.progress.get("steps"),
            loss=self.progress.get("loss"),
            tokens_per_s=self.progress.get("tokens_per_s"),
            node_unanswered_s=node_unanswered_s,
            unanswered_s=unanswered_s,
            quiet_s=self.progress.get("silent_s", 0.0) + unanswered_s,
            error=self.error,
            failed_at=self.failed_at,
            user_error=self.user_error,
            peer_failed=self.peer_failed,
        )


def create_actor(resources: ResourcesConfig, strategy: Any) -> Any:
    """A new actor for a worker. strategy: where it goes, for Ray's scheduling_strategy."""
    import ray

    from cluster.worker import Worker

    environment = {
        "OMP_NUM_THREADS": str(resources.threads),  # Ray's own default is 1
        "DS_ACCELERATOR": "cuda" if resources.gpus_per_worker else "cpu",
        "TORCHDYNAMO_DISABLE": "1",  # compiling is not used; its imports take seconds
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a look for GPUs must not open them in a process that forks
    }
    actor = ray.remote(Worker).options(
        num_cpus=resources.threads,
        num_gpus=resources.gpus_per_worker,
        max_concurrency=5,  # train, ping, stop, end, and one to spare
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=strategy,
    )
    return actor.remote(os.getcwd(), environment)
