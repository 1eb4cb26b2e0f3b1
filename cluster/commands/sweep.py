"""`shardyard sweep`: many runs of one recipe with different values, compared by one metric."""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.commands.output import DEFAULT_STORE, run_arguments, say, table
from cluster.search_space import Space, Values, corners, draw, grid, overrides, split_space
from configs.errors import Interrupted, Preempted, RunFailed, UsageError
from configs.messages import nearest
from configs.problems import ConfigError
from configs.schema import RunConfig

if TYPE_CHECKING:
    from cluster.sweep import Sweep
    from cluster.sweep_folder import SweepFolder

ALGORITHMS = ("grid", "random", "asha", "pbt")
DEFAULT_METRIC = "validation/loss"
DEFAULT_TRIALS = 8
# Checkpoints of a member that another may go on from while it trains on: see cluster/sweep_schedulers.py.
POPULATION_KEEPS = 5


def sweep(arguments: Namespace) -> dict[str, Any]:
    """Run a sweep to its end, or go on with the one of this name; prints its trials, the best first.

    Raises:
        Interrupted: Ctrl-C; all trials are saved. Preempted: SIGTERM, SIGUSR1; likewise.
        RunFailed: no trial is left that has not failed.
    """
    from cluster.progress_bar import Narrator
    from cluster.sweep import Sweep

    folder = _known(arguments) if arguments.resume else _asked_for(arguments)
    spec = folder.spec
    say(arguments, f"Sweep '{folder.name}': {spec.algorithm}, {len(spec.trials)} trials by {spec.goal} {spec.metric}.")
    narrator = Narrator(sys.stderr if arguments.json else sys.stdout)
    launched = Sweep(folder, address=arguments.address, parallel=arguments.parallel, narrator=narrator)
    launched.wait()
    return _end(arguments, launched)


def _known(arguments: Namespace) -> SweepFolder:
    from cluster.sweep_folder import SweepFolder
    from data_pipelines.storage import Store

    given = [arguments.name, arguments.trials, arguments.metric, arguments.goal]
    if arguments.overrides or any(given):
        raise UsageError(
            f"--resume goes on with sweep '{arguments.resume}' as it is: nothing but --store, --parallel and --address "
            "stands beside it. To start another sweep, leave --resume out."
        )
    return SweepFolder.open(Store(arguments.store), arguments.resume)


def _asked_for(arguments: Namespace) -> SweepFolder:
    """The sweep that the arguments describe, begun unless it is there; all of its configs are checked first."""
    from cluster.sweep_folder import Spec, SweepFolder
    from data_pipelines.storage import Store
    from trainer.validate import load_recipe

    recipe, algorithm, assignments = _words(arguments.overrides)
    if arguments.store != DEFAULT_STORE:
        raise UsageError("--store goes with --resume. A new sweep is kept where its recipe says: store=...")
    fixed, space = split_space(assignments)
    metric, goal = _metric(arguments)
    trials = _trials(arguments, algorithm, space)
    base = load_recipe(recipe, fixed)
    _check_algorithm(algorithm, base.config, space, trials)
    if algorithm == "pbt":
        keep = base.config.checkpoint.keep
        fixed += [f"checkpoint.every={base.config.evaluation.every}"]
        fixed += [] if keep is None else [f"checkpoint.keep={max(keep, POPULATION_KEEPS)}"]
        base = load_recipe(recipe, fixed)
    name = arguments.name or f"{base.config.name}-{algorithm}"
    _check_name(base.config, name, algorithm, len(trials))
    _check_values(base.config, [*trials, *(corners(space) if algorithm == "pbt" else [])])
    spec = Spec(
        algorithm=algorithm,
        space=[argument for argument in assignments if argument.partition("=")[0].strip() in space],
        metric=metric,
        goal=goal,
        seed=arguments.seed,
        trials=trials,
    )
    return SweepFolder.create(Store(base.config.store), name, spec, base)


def _words(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """RECIPE, algorithm and assignments, as they follow each other."""
    usage = "shardyard sweep RECIPE grid|random|asha|pbt key=a,b,c (or go on with a sweep: --resume NAME)"
    if len(words) < 2:
        raise UsageError(f"Say what to sweep, and how: {usage}.")
    recipe, algorithm, *assignments = words
    if algorithm not in ALGORITHMS:
        near = nearest(algorithm, ALGORITHMS)
        hint = f" Did you mean '{near}'?" if near else ""
        raise UsageError(f"'{algorithm}' is no way to choose values.{hint} Write {usage}.")
    return recipe, algorithm, assignments


def _metric(arguments: Namespace) -> tuple[str, str]:
    if arguments.metric is None:
        return DEFAULT_METRIC, arguments.goal or "min"
    metric = arguments.metric if "/" in arguments.metric else f"validation/{arguments.metric}"
    if not metric.startswith("validation/"):
        raise UsageError(f"--metric {metric}: trials are compared by an evaluation, validation/loss for example.")
    if arguments.goal is None and metric != DEFAULT_METRIC:
        raise UsageError(f"Say with --goal min or --goal max whether less or more of {metric} is better.")
    return metric, arguments.goal or "min"


def _trials(arguments: Namespace, algorithm: str, space: Space) -> list[Values]:
    if not space:
        raise UsageError(
            "The sweep varies nothing. Name a key with its values, optimizer.lr=1e-3,3e-3 for example, or a range, "
            "optimizer.lr=log:1e-4:1e-2."
        )
    if algorithm != "grid":
        return draw(space, arguments.seed, arguments.trials or DEFAULT_TRIALS)
    trials = grid(space)
    if arguments.trials is not None:
        raise UsageError(f"A grid has all of its {len(trials)} points. Leave --trials out, or use random.")
    return trials


def _check_algorithm(algorithm: str, config: RunConfig, space: Space, trials: Sequence[Values]) -> None:
    """Raises UsageError for what an algorithm cannot work with."""
    from trainer.parent import is_free, may_change

    if algorithm not in ("asha", "pbt"):
        return
    every, steps = config.evaluation.every, max(values.get("steps", config.steps) for values in trials)
    if every is None or every >= steps:
        raise UsageError(
            f"{algorithm} compares trials while they train, and this recipe evaluates at its end alone "
            f"(evaluation.every={'null' if every is None else every}, steps={steps}). Set "
            f"evaluation.every={max(1, steps // 10)} for example, or use random."
        )
    if algorithm == "pbt" and len(trials) < 2:
        raise UsageError("A population has at least two members. Use --trials 4 for example, or random.")
    bound = [key for key in space if key == "steps" or not is_free(key, "all")] if algorithm == "pbt" else []
    if bound:
        raise UsageError(
            f"pbt changes values while it trains, and {', '.join(bound)} cannot change then. {may_change('all')} "
            "steps is the same for a whole population. Leave it out, or use random or asha."
        )


def _check_name(config: RunConfig, name: str, algorithm: str, num_trials: int) -> None:
    """Refuse a name that some of the sweep's runs could not have."""
    from trainer.validate import load_recipe

    longest = f"{name}-{num_trials:04d}"
    if algorithm == "pbt":
        assert config.evaluation.every is not None
        longest += f"-g{config.steps // config.evaluation.every + 1}"
    try:
        load_recipe(config, overrides({"name": longest}))
    except ConfigError as error:
        raise UsageError(f"The sweep's runs have its name: {error}. Give it another with --name.") from error


def _check_values(config: RunConfig, candidates: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a value that the recipe refuses, before anything starts."""
    from trainer.validate import load_recipe, validate

    for values in candidates:
        given = overrides(values)
        try:
            validate(load_recipe(config, given))
        except ConfigError as error:
            raise UsageError(f"The recipe refuses {' '.join(given)}: {error}") from error


def _end(arguments: Namespace, launched: Sweep) -> dict[str, Any]:
    """Tell how it ended, and what to do next."""
    from cluster.sweep import results

    folder = launched.folder
    spec, store = folder.spec, folder.base.config.store if not arguments.resume else arguments.store
    rows = results(folder)
    keys = list(spec.trials[0])
    say(arguments)
    table(
        arguments,
        ("RUN", "STATUS", "STEP", spec.metric.upper(), *keys),
        [(row["run"], row["status"], row["step"], row["value"], *(row["values"][key] for key in keys)) for row in rows],
    )
    for row in rows:
        if row["error"]:
            say(arguments, f"\n{row['run']} has failed: {row['error']}")
    go_on = f"shardyard sweep --resume {run_arguments(folder.name, store)}"
    if not launched.in_mlflow:
        say(arguments, f"\nMLflow has not got everything yet: {go_on} sends it.")
    if launched.first_signal is not None:
        kind = Interrupted if launched.first_signal == signal.SIGINT else Preempted
        saved = "at once; its trials go on from their newest checkpoints" if launched.was_cut_off else "and saved"
        raise kind(f"Sweep '{folder.name}' was stopped {saved}. Go on with: {go_on}")
    if all(row["status"] == "failed" for row in rows):
        raise RunFailed(f"All trials of sweep '{folder.name}' have failed, the first of: {rows[0]['error']}")
    best = rows[0]
    if best["value"] is not None:
        say(
            arguments,
            f"\nBest: {best['run']}, {spec.metric} {best['value']:.4g}, {' '.join(overrides(best['values']))}.",
        )
        say(arguments, f"  record  shardyard runs show {run_arguments(best['run'], store)}")
    if any(row["status"] == "failed" for row in rows):
        say(arguments, f"  try the failed trials again  {go_on}")
    return {"sweep": folder.name, "metric": spec.metric, "goal": spec.goal, "best": best["run"], "trials": rows}
