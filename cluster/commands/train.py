"""`shardyard train`: a run in the foreground, on an embedded Ray or on a cluster that is already there."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.output import run_arguments, say
from configs.errors import NotFound, ShardyardError, UsageError
from configs.schema import ParentConfig, RunConfig

if TYPE_CHECKING:
    from cluster.launch import Run
    from cluster.targets import Job
    from configs.targets import Target


def train(arguments: Namespace) -> dict[str, Any]:
    """Train a recipe; the same name launched again goes on with the run.

    Raises:
        Interrupted: Ctrl-C; saved, resumable. Preempted: SIGTERM, SIGUSR1; likewise.
        RunFailed: names the first failure and the next command.
    """
    overrides = list(arguments.overrides)
    if arguments.parent is not None:
        parent = _parent(arguments)
        overrides += [f"parent.checkpoint={json.dumps(parent.checkpoint)}", f"parent.state={parent.state}"]
        tokenizer_file = _tokenizer_file(arguments, parent)
        if tokenizer_file is not None:
            overrides.append(f"task.tokenizer.file={json.dumps(tokenizer_file)}")
            say(arguments, f"The text is encoded with the parent's tokenizer: {overrides[-1]}")
    elif arguments.branch:
        raise UsageError("--branch goes with --from: `shardyard train RECIPE --from RUN@STEP --branch name=...`.")
    return on_target(arguments, overrides)


def on_target(arguments: Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Train where `--on` says: here in the foreground, or as a job of a target, which is followed or left alone."""
    from configs.targets import LocalTarget, RayTarget, load_target

    settings = load_target(arguments.on)
    if arguments.priority and not isinstance(settings, RayTarget):
        raise UsageError(
            f"--priority is for Shardyard's own queue, on a Ray cluster; {arguments.on} has none. A site's scheduler "
            "takes its own settings, such as options: [--qos=high] of a Slurm target."
        )
    if isinstance(settings, LocalTarget):
        if arguments.detach:
            raise UsageError("-d leaves a job at a target; a run on this machine ends with its command. Use --on.")
        arguments.address, arguments.device = arguments.address or settings.address, settings.device
        if arguments.dry_run:
            return dry_run_here(arguments, overrides)
        return foreground(arguments, arguments.recipe, overrides)
    if arguments.address:
        raise UsageError(f"--address is for this machine, and --on {arguments.on} for another. Use one of them.")
    return send(arguments, settings, overrides)


def dry_run_here(arguments: Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Print the run's config as it would be trained."""
    from configs.load import dump
    from trainer.validate import load_recipe, validate

    resolved = load_recipe(arguments.recipe, overrides)
    validate(resolved)
    say(arguments, dump(resolved))
    return {"target": "local", "rendered": dump(resolved)}


def send(arguments: Namespace, settings: Target, overrides: Sequence[str]) -> dict[str, Any]:
    """Queue the run at a target, and follow it unless told to leave it."""
    from cluster.ahead import Ahead
    from cluster.following import Following, shared_store
    from cluster.following import send as submit
    from cluster.targets import Job, open_target
    from trainer.validate import load_recipe, validate

    resolved = load_recipe(arguments.recipe, overrides)
    plan = validate(resolved)
    found = Ahead.of(plan, settings.device, here=False).find()
    expected_s = None if found is None else found.total_s
    job, target, name = (
        Job(resolved, priority=arguments.priority, expected_s=expected_s),
        open_target(settings),
        arguments.on,
    )
    if arguments.dry_run:
        shared_store(job)
        text = target.render(job)
        say(arguments, text)
        return {"target": name, "rendered": text}
    job_id = submit(target, name, job)
    come_back = f"the same command comes back to it, and `shardyard runs stop {_named(job)}` saves and ends it"
    sent = {"run": job.run, "target": name, "job": job_id}
    head = plan.headline() if found is None else f"{plan.headline()}\n{found.headline()}"
    say(arguments, f"{head}\nJob {job_id} at {name}.")
    if arguments.detach:
        say(arguments, f"It goes on without this command: {come_back}.")
        return sent
    try:
        result = Following(target, name, job, job_id, json=arguments.json).wait()
    except KeyboardInterrupt:
        say(arguments, f"\nLeft alone, run '{job.run}' goes on at {name}: {come_back}.")
        return sent
    say(
        arguments,
        f"Run '{job.run}' has {result['outcome']} after step {result['step']:,}: shardyard runs show {_named(job)}",
    )
    return result


def _named(job: Job) -> str:
    return run_arguments(job.run, job.resolved.config.store)


def foreground(arguments: Namespace, recipe: str | Path | RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Launch, narrate and wait; returns how the run ended."""
    from cluster.launch import train as launch

    device = getattr(arguments, "device", None)  # `runs resume` has no target
    run = launch(recipe, overrides, address=arguments.address, json=arguments.json, device=device)
    result = run.wait()
    _farewell(arguments, run, result)
    return result


def _farewell(arguments: Namespace, run: Run, result: dict[str, Any]) -> None:
    """What came out of it, where it is, and what can be done with it."""
    from cluster.mlflow_copy import ui_command

    more = run_arguments(run.name, run.record.config.store)
    metrics = result["metrics"]
    found = {name: metrics[name] for name in ("loss", "validation/loss", "validation/bits_per_byte") if name in metrics}
    shown = "".join(f", {name} {value:.4g}" for name, value in found.items())
    say(arguments, f"\nRun '{run.name}' has {result['outcome']} after step {result['step']:,}{shown}.")
    for event in run.record.events():
        if event["kind"] == "best_evaluation" and event["step"] == result["step"]:
            best = f"{event['metric']} {event['best']:.4g}"
            say(arguments, f"Its weights are those of the best evaluation, after step {event['best_step']:,}: {best}.")
    say(arguments, f"  checkpoint  {result['checkpoint'] or 'none'}")
    say(arguments, f"  record      shardyard runs show {more}")
    if result["outcome"] == "stopped":
        say(arguments, f"  go on       {run.resume_command}")
    elif run.record.config.task.name == "language_modeling":
        say(arguments, f"  write text  shardyard generate {more} --prompt '...'")
    if (command := ui_command(run.record)) is not None:
        say(arguments, f"  MLflow      {command}")


def _parent(arguments: Namespace) -> ParentConfig:
    """Where `--from` points, refused where the recipe does not fit it; says what is taken, and what may change.

    RUN, RUN@STEP, the folder or URI of a checkpoint, or a Hugging Face folder with a Llama.
    """
    from data_pipelines.storage import Store
    from trainer.parent import State, check_llama, check_parent, may_change
    from trainer.validate import load_recipe

    config = load_recipe(arguments.recipe, arguments.overrides).config
    known = _known_parent(arguments, config)
    if known is not None:
        return known
    state: State = "all" if arguments.branch else "weights"
    source = Store(arguments.parent)
    folder = source.local_path()
    if folder is not None and source.exists("config.json") and not source.exists("manifest.json"):
        if arguments.branch:
            raise UsageError(
                f"--branch needs a whole state, and {arguments.parent} holds weights alone. Leave --branch out."
            )
        check_llama(config, folder)
        say(arguments, f"Starting from the weights of {folder}: the optimizer and the position in the data are new.")
        return ParentConfig(checkpoint=str(folder), state="weights")
    reader = _reader(arguments.parent, source, config)
    manifest = reader.manifest
    check_parent(config, manifest, state)
    what = "the whole state" if arguments.branch else "the weights"
    say(arguments, f"Starting from {what} of {manifest['run']}@{manifest['step']}. {may_change(state)}")
    return ParentConfig(checkpoint=reader.store.path(), state=state)


def _tokenizer_file(arguments: Namespace, parent: ParentConfig) -> str | None:
    """Where the parent's tokenizer is kept in the store; None where the recipe trains none, or trained the same.

    A run that goes on keeps what its first launch found: its parent may be gone.
    """
    from data_pipelines.build import FOLDER, dataset_name, newest_built
    from data_pipelines.index import TOKENIZER_FILE
    from data_pipelines.storage import Store
    from data_pipelines.tokenizer_file import keep_tokenizer, parse_tokenizer, same_ids
    from trainer.parent import tokenizer_of
    from trainer.record import RunRecord
    from trainer.validate import load_recipe, validate

    plan = validate(load_recipe(arguments.recipe, arguments.overrides))
    if plan.tokenizer is None or plan.tokenizer.name != "bpe" or plan.tokenizer.file is not None:
        return None
    store = Store(plan.config.store)
    with suppress(NotFound):
        known = RunRecord.open(store.uri, plan.config.name).config.task.settings.get("tokenizer") or {}
        return known.get("file")
    text = tokenizer_of(parent.checkpoint)
    if text is None:
        return None
    built: str | None
    try:
        built = dataset_name(plan.config.data, plan.tokenizer)
    except ShardyardError:  # the source is gone: the run will read what was built from it
        built = newest_built(store, plan.config.data, plan.tokenizer)
    own = None if built is None else store.child(FOLDER, built)
    if own is not None and own.exists(TOKENIZER_FILE) and same_ids(own.read_text(TOKENIZER_FILE), text):
        return None
    return keep_tokenizer(store, parse_tokenizer(text, parent.checkpoint, plan.tokenizer.vocab_size))


def _reader(parent: str, source: Any, config: RunConfig) -> Any:
    from cluster.commands.inference import find_checkpoint
    from trainer.checkpoint import open_checkpoint

    if source.exists("manifest.json"):
        return open_checkpoint(source.uri)
    name = parent.partition("@")[0]
    if name == config.name:
        raise UsageError(
            f"The new run would have its parent's name, '{name}'. Give it one of its own: name=... (to go on with "
            f"'{name}' itself: shardyard runs resume {name})."
        )
    try:
        return find_checkpoint(parent, config.store)
    except NotFound as error:
        raise NotFound(f"--from {parent}: {error}") from error


def _known_parent(arguments: Namespace, config: RunConfig) -> ParentConfig | None:
    """The parent that an earlier launch of the same command found.

    A parent that trains on has newer checkpoints by now, or has deleted that one; a run that goes on needs neither.
    """
    from data_pipelines.storage import Store
    from trainer.record import RunRecord

    try:
        parent = RunRecord.open(config.store, config.name).config.parent
    except NotFound:
        return None
    if parent is None or (parent.state == "all") != arguments.branch:
        return None
    if Store(arguments.parent).path() == parent.checkpoint:
        return parent
    name, _, step = arguments.parent.partition("@")
    *_, run, _, folder = ["", "", *parent.checkpoint.rstrip("/").split("/")]
    same_step = not step or folder.removeprefix("step-").lstrip("0") == step.lstrip("0")
    return parent if run == name and same_step else None
