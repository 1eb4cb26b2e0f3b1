"""The training loop: the only one. Evaluation, records and checkpoints are `if` blocks in it, in order."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Literal

from configs.duration import Interval
from data_pipelines.loader import evaluation_batches
from trainer import device, stopwatch
from trainer.distributed import of_rank_0
from trainer.engine import StepStats
from trainer.extremes import Extremes
from trainer.schedules import lr_at
from trainer.session import Session
from trainer.step_times import StepTimes, rank_rows_every

MEMORY_EVERY_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a worker's part of an attempt ended, and after which step (counted in completed steps)."""

    outcome: Literal["finished", "stopped"]
    step: int


def train(session: Session, stop: threading.Event) -> Outcome:
    """Train from `session.start_step` to the last step, or until any rank is asked to stop, or early stopping ends it.

    A step is numbered by the steps completed with it: the first is 1, and its checkpoint is step-00000001.
    Ranks agree on stopping and saving in the collective that sums the valid items, so that a signal on
    one rank hangs nobody. The end is always evaluated on the whole validation split and saved, then shown: a sample of
    text, pictures.

    Raises:
        RunFailed: training diverged, and is not to go on, or the last checkpoint could not be saved.
    """
    config, engine, progress, early = session.config, session.engine, session.progress, session.early_stopping
    divergence, policy = session.divergence, session.config.recovery.divergence
    meter = Meter(session)
    rank_every = rank_rows_every(config.steps, config.tracking.every, session.world.size)
    saves = SaveClock(config.checkpoint.interval)
    done = session.start_step
    ends_early = early is not None and early.ended
    if policy == "rollback" and not session.resumed:
        session.save(done)  # there must be something to return to
    while done < config.steps and not ends_early:
        step, done = done, done + 1
        progress.phase = "data"
        micro_batches = session.micro_batches(step)
        lr = lr_at(config.schedule, config.optimizer.lr, step, config.steps)
        votes = (stop.is_set(), saves.due(done))
        limits = divergence.limits() if policy == "skip" else None  # the others give the weights up afterwards
        stats = engine.train_step(session.task, micro_batches, lr=lr, step=step, votes=votes, limits=limits)
        stopping, save_due = stats.votes
        last = done == config.steps
        meter.add(stats)
        progress.step, progress.loss, progress.tokens_per_s = done, stats.loss, meter.tokens_per_s
        if (finding := divergence.judge(done, stats)) is not None:
            session.log_divergence(finding)
            divergence.count(finding)
            if policy == "rollback":
                done = session.roll_back(done)
                meter.roll_back()
                continue
        # A reading at each save, too: what a restart from there does not repeat is then recorded.
        may_save = save_due or (early is not None and due(done, config.evaluation.every))
        if due(done, config.tracking.every) or may_save or last or stopping:
            session.log_metrics(done, meter.read(stats, lr))
        if due(done, rank_every) or last or stopping:
            session.log_rank(done, meter.read_rank())
        evaluation: dict[str, float] = {}
        if early is not None and (due(done, config.evaluation.every) or last):
            progress.phase = "evaluation"
            evaluation = evaluate(session, config.evaluation.examples)
            session.log_metrics(done, evaluation)
            best = early.add(done, of_rank_0(early.value_in(evaluation)))
            ends_early = early.ended
            last = last or ends_early
            save_due = save_due or best
            if last and not best and early.best_step:
                session.return_to_best(done)
        if last or (early is None and due(done, config.evaluation.every)):
            progress.phase = "evaluation"
            evaluation = evaluate(session, None if last else config.evaluation.examples)
            session.log_metrics(done, evaluation)
        if save_due or stopping or last:
            progress.phase = "checkpoint"
            session.save(done, evaluation)
            saves.saved()
        if stopping and not last:
            session.wait_until_saved(done)
            session.log_memory()
            return Outcome("stopped", done)
        meter.pause()
    progress.steps = done
    session.wait_until_saved(done)
    session.log_memory()
    session.log_sample(done)  # after the save: what goes wrong here costs no training
    session.log_pictures(done)
    return Outcome("finished", done)


def due(step: int, every: int | None) -> bool:
    """Whether something done every `every` steps (None: never) is due after `step` completed steps."""
    return every is not None and step % every == 0


def evaluate(session: Session, num_examples: int | None) -> dict[str, float]:
    """Metrics over `num_examples` of the validation split, spread over it (None: all), each counted exactly once."""
    started = time.perf_counter()
    batches = evaluation_batches(
        session.validation(num_examples),
        session.data.prepare_evaluation,
        micro_batch_size=session.config.batch.micro_batch_size,
        rank=session.world.rank,
        world_size=session.world.size,
        num_examples=num_examples,
        threads=session.config.resources.loader_threads,
        pad=session.data.pad,
        ragged=session.data.ragged,
    )
    sums, predictions = session.engine.evaluate(session.task, batches, session.data.datasets[0].tokenizer)
    metrics = session.task.metrics(sums, session.data.validation_totals)
    if session.task.has_predictions:
        metrics |= session.task.scores(predictions)
    return {f"validation/{name}": value for name, value in metrics.items()} | {
        "validation/seconds": time.perf_counter() - started
    }


class SaveClock:
    """When the next checkpoint is due: every n steps, or every so many seconds since the last one."""

    def __init__(self, every: Interval) -> None:
        self._every = every
        self._saved_at = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether this rank finds that a save is due after `done` steps; ranks' clocks differ, so it is only a vote."""
        if self._every.seconds is not None:
            return time.monotonic() - self._saved_at >= self._every.seconds
        return due(done, self._every.steps)

    def saved(self) -> None:
        """Start counting anew."""
        self._saved_at = time.monotonic()


class Meter:
    """What steps were like since it was last read, without the time of evaluation and checkpoints."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tokens_per_s: float | None = None
        self._tokens = 0
        self._times = StepTimes()
        self._rank_times = StepTimes()  # read more rarely
        self._extremes = Extremes()
        self._memory_at = -math.inf
        self.pause()

    def add(self, stats: StepStats) -> None:
        """Count the step that just ended."""
        step_s, collective_s = self._since()
        self.pause()
        wait_s = self._session.loader.wait_s
        parts = (wait_s, stats.forward_s, stats.backward_s, stats.optimizer_s, collective_s, stats.checkpoint_s)
        self._times.add(step_s, parts)
        self._rank_times.add(step_s, parts)
        self._extremes.add((stats.loss, stats.grad_norm))
        self._tokens += stats.num_tokens
        self.tokens_per_s = self._tokens / self._times.step_s if self._tokens else None

    def pause(self) -> None:
        """Leave out what happened since the step ended."""
        self._mark, self._waited_s = time.perf_counter(), stopwatch.waited_s()

    def _since(self) -> tuple[float, float]:
        """Seconds since then, and those of them in collectives."""
        return time.perf_counter() - self._mark, stopwatch.waited_s() - self._waited_s

    def roll_back(self) -> None:
        """Forget the losses of what was rolled back: all since the last reading, as each save has one.

        Speeds stay those of all steps that were made.
        """
        self._extremes.forget()
        self.pause()

    def read(self, stats: StepStats, lr: float) -> dict[str, float]:
        """Metrics of the latest step; extremes, and means of times, since the last reading (docs/metrics.md)."""
        step_s = self._times.step_s / self._times.steps
        metrics = {
            "loss": stats.loss,
            "lr": lr,
            "items": float(stats.num_items),
            "examples_per_s": self._session.config.batch.global_batch_size / step_s,
            "skipped": float(stats.skipped),
        }
        if self._tokens:
            metrics["tokens_per_s"] = self._tokens / self._times.step_s
        if stats.grad_norm is not None:
            metrics["grad_norm"] = stats.grad_norm
        metrics |= self._times.read() | self._extremes.read() | self._session.device_metrics(step_s)
        self._tokens = 0
        return metrics

    def read_rank(self) -> dict[str, float]:
        """Times of this rank since they were last read, and now and then its memory, which takes longer to ask for."""
        values = self._rank_times.read()
        if (now := time.monotonic()) - self._memory_at >= MEMORY_EVERY_S:
            self._memory_at = now
            values |= device.memory_now(self._session.world.device)
        return values
