"""A sweep's folder in the store: what it is, and every decision that its trials follow. JSON and YAML alone.

    <store>/sweeps/<name>/sweep.json           algorithm, space, metric, and the values that each trial begins with
                          recipe.yaml          the config that all trials share
                          stopped/0003.json    trial 3 is not worth going on with after this step
                          failed/0003.json     what trial 3 failed of, in its latest launch
                          generations/0002.json  the second decision of a population: who goes on from whose weights
                          stop.json            somebody asked the sweep to stop
                          mlflow.json          its run in MLflow, the parent of the trials'
                          lease/               who runs it now

A decision is written before it takes effect, and a trial learns of it here and nowhere else. So a sweep that was killed
anywhere goes on with the same trials, and nothing that Ray Tune keeps in memory or writes is needed for it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.search_space import Values, overrides
from configs.errors import Damaged, NotFound, UsageError
from configs.load import COMMAND_LINE, Resolved, dump, load_resolved
from configs.schema import flatten
from data_pipelines.storage import Store
from trainer.record import RunRecord
from trainer.run_folder import SWEEPS

_SPEC, _RECIPE, _STOP = "sweep.json", "recipe.yaml", "stop.json"


@dataclass(frozen=True)
class Spec:
    """What a sweep is. trials: the values that each begins with, by number from 1; space: the arguments as given."""

    algorithm: str
    space: list[str]
    metric: str
    goal: str
    seed: int
    trials: list[Values]


@dataclass(frozen=True)
class Trial:
    """A trial as it stands. run: the one that it trains now; after: evaluations up to this step count no more.

    parent: name and step of the checkpoint that its run branched from, None where it began anew. stopped_at: the step
    after which it was found not worth going on with.
    """

    number: int
    run: str
    values: Values
    after: int = 0
    parent: tuple[str, int] | None = None
    stopped_at: int | None = None


@dataclass(frozen=True)
class Branch:
    """A member of a population that goes on from another's weights, with other values."""

    number: int
    run: str
    parent: str
    values: Values


class SweepFolder:
    """One sweep's folder. Open it with `create` (the command) or `open` (a trial)."""

    def __init__(self, root: Store, name: str, spec: Spec, base: Resolved) -> None:
        self.root = root
        self.name = name
        self.spec = spec
        self.base = base
        self.store = root.child(SWEEPS, name)

    @classmethod
    def create(cls, root: Store, name: str, spec: Spec, base: Resolved) -> SweepFolder:
        """Begin a sweep, or go on with the one of this name if it is the same.

        Raises:
            UsageError: the name belongs to another sweep, or to a run.
        """
        store = root.child(SWEEPS, name)
        if store.exists(_SPEC):
            known = cls.open(root, name)
            known._refuse_another(spec, base)
            return known
        store.write_atomic(_RECIPE, dump(base))
        store.write_atomic(_SPEC, json.dumps(asdict(spec), indent=1))  # last: from now on it is a sweep
        return cls(root, name, spec, base)

    @classmethod
    def open(cls, root: Store, name: str) -> SweepFolder:
        """An existing sweep.

        Raises:
            NotFound: no sweep of this name, with the nearest one. Damaged: its files cannot be read.
        """
        store = root.child(SWEEPS, name)
        if not name or not store.exists(_SPEC):
            near = difflib.get_close_matches(name, root.list_dirs(SWEEPS), n=1)
            hint = f"Did you mean '{near[0]}'?" if near else "Start one: shardyard sweep RECIPE random key=a,b"
            raise NotFound(f"There is no sweep '{name}' in {root.uri}. {hint}")
        spec, text = store.read_text(_SPEC), store.read_text(_RECIPE)
        try:
            return cls(root, name, Spec(**json.loads(spec)), load_resolved(text, _RECIPE))
        except (UsageError, ValueError, TypeError) as error:
            raise Damaged(f"The sweep in {store.uri} cannot be read: {error}. Start it under another name.") from error

    def _refuse_another(self, spec: Spec, base: Resolved) -> None:
        # Apart, since both have a seed.
        pairs = [(asdict(self.spec), asdict(spec)), (_flat(self.base), _flat(base))]
        differing = [
            (key, theirs.get(key), mine.get(key))
            for theirs, mine in pairs
            for key in {**theirs, **mine}
            if theirs.get(key) != mine.get(key)
        ]
        if differing:
            shown = [f"{key}: {theirs!r} there, {mine!r} here" for key, theirs, mine in differing if key != "trials"]
            raise UsageError(
                f"The name '{self.name}' belongs to another sweep ({'; '.join(shown[:8]) or 'its trials differ'}), in "
                f"{self.store.uri}. Use another name (--name), or go on with it as it is: --resume {self.name}."
            )

    # --- trials

    def trial(self, number: int) -> Trial:
        """How a trial stands, by all that was decided."""
        trial = Trial(number, f"{self.name}-{number:04d}", self.spec.trials[number - 1])
        for generation in self.generations():
            trial = replace(trial, after=generation["step"])
            for branch in (Branch(**fields) for fields in generation["branches"]):
                if branch.number == number:
                    parent = (branch.parent, generation["step"])
                    trial = replace(trial, run=branch.run, values=branch.values, parent=parent)
        stopped = self._note(f"stopped/{number:04d}.json")
        return trial if stopped is None else replace(trial, stopped_at=stopped["step"])

    def trials(self) -> list[Trial]:
        """All of them."""
        return [self.trial(number) for number in range(1, len(self.spec.trials) + 1)]

    def runs(self) -> list[str]:
        """Names of all runs that belong to it, also of those that a population has left behind."""
        branched = [branch["run"] for generation in self.generations() for branch in generation["branches"]]
        return [*(f"{self.name}-{number:04d}" for number in range(1, len(self.spec.trials) + 1)), *branched]

    def resolved(self, trial: Trial) -> Resolved:
        """The config of a trial's run.

        Raises:
            ConfigError: the recipe refuses its values. NotFound: the checkpoint that it branches from is gone.
        """
        from trainer.validate import load_recipe  # torch; who only looks at a sweep does without

        given = [f"name={trial.run}", *overrides(trial.values)]
        if trial.parent is not None:
            run, step = trial.parent
            folder = RunRecord.open(self.root.uri, run).store.path(f"checkpoints/step-{step:08d}")
            given += [f"parent.checkpoint={json.dumps(folder)}", "parent.state=all"]
        found = load_recipe(self.base.config, given)
        keys = {override.partition("=")[0] for override in given}
        origins = {
            key: COMMAND_LINE if _varied(key, keys) else self.base.origins.get(key, origin)
            for key, origin in found.origins.items()
        }
        return Resolved(found.config, origins, self.base.path)

    def create_run(self, trial: Trial) -> RunRecord:
        """The record of a trial's run, begun where there is none yet.

        Raises:
            UsageError: a run with another config has its name.
        """
        with contextlib.suppress(NotFound):
            known = RunRecord.open(self.root.uri, trial.run)
            if known.lineage().get("sweep") == self.name:
                return known
        try:
            record = RunRecord.create(self.root, self.resolved(trial))
        except UsageError as error:
            raise UsageError(
                f"Trial {trial.number} of sweep '{self.name}': {error} Or name the sweep: --name."
            ) from error
        record.update_lineage(sweep=self.name)  # last: from now on it is known as the sweep's
        record.close()
        return record

    # --- decisions

    def stop_trial(self, number: int, step: int) -> None:
        """A trial is not worth going on with: its evaluation after `step` was too far behind."""
        self.store.write_atomic(f"stopped/{number:04d}.json", json.dumps({"step": step}))

    def generations(self) -> list[dict[str, Any]]:
        """All decisions of a population so far: {step, branches}."""
        return [json.loads(self.store.read_text(f"generations/{name}")) for name in self.store.list("generations")]

    def add_generation(self, step: int, branches: Sequence[Branch]) -> None:
        """After `step` some members go on from others; all evaluations up to it are used."""
        number = len(self.store.list("generations")) + 1
        text = json.dumps({"step": step, "branches": [asdict(branch) for branch in branches]}, indent=1)
        self.store.write_atomic(f"generations/{number:04d}.json", text)

    def fail_trial(self, number: int, error: str | None) -> None:
        """What a trial failed of; None forgets it."""
        path = f"failed/{number:04d}.json"
        if error is not None:
            self.store.write_atomic(path, json.dumps({"error": error}))
        elif self.store.exists(path):
            self.store.delete(path)

    def failure(self, number: int) -> str | None:
        """What a trial failed of in its latest launch."""
        note = self._note(f"failed/{number:04d}.json")
        return None if note is None else str(note["error"])

    # --- control

    def request_stop(self, reason: str) -> None:
        """Let all trials save and stop."""
        self.store.write_atomic(_STOP, json.dumps({"reason": reason}))

    def stop_requested(self) -> str | None:
        """Why the trials are to stop, None if they are not."""
        note = self._note(_STOP)
        return None if note is None else str(note["reason"])

    def forget_stop(self) -> None:
        """A new launch begins."""
        if self.store.exists(_STOP):
            self.store.delete(_STOP)

    def _note(self, path: str) -> dict[str, Any] | None:
        note: dict[str, Any] | None = json.loads(self.store.read_text(path)) if self.store.exists(path) else None
        return note


def _flat(base: Resolved) -> dict[str, Any]:
    return flatten(base.config.model_dump(exclude={"store"}))


def _varied(key: str, keys: set[str]) -> bool:
    return any(key == varied or key.startswith(f"{varied}.") for varied in keys)
