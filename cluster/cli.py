"""The command line: every command's arguments in one place, its work in `cluster/commands/`, imported when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import traceback
from typing import Any

from cluster.commands.output import DEFAULT_STORE
from configs.errors import Interrupted, ShardyardError

_DATA_SET = "a recipe, or the folder or URI of a data set"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (see DESIGN: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 not found, ...)."""
    arguments = parse(argv)
    module, _, function = arguments.handler.partition(":")
    try:
        result = getattr(importlib.import_module(f"cluster.commands.{module}"), function)(arguments)
        if arguments.json and result is not None:
            print(json.dumps(result, default=str))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nobody is left to tell, and Python's flush at exit must not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return Interrupted.exit_code
    except Exception as error:
        return report_error(error, arguments)
    return 0


def report_error(error: Exception, arguments: argparse.Namespace) -> int:
    """One paragraph on stderr, with -v also the traceback, with --json also an object on stdout; the exit code.

    Secrets that libraries put into their errors are taken out of all three.
    """
    from trainer.redact import Redactor

    redactor = Redactor(os.environ)
    if arguments.verbose:
        print(redactor.text("".join(traceback.format_exception(error))), file=sys.stderr)
    text, exit_code = str(error), 1
    if isinstance(error, ShardyardError):
        exit_code = error.exit_code
    elif isinstance(error, ModuleNotFoundError):
        text = f"{error}. Install what Shardyard needs (make setup), and call the shardyard of that environment."
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}). This is an error in the program, not "
            "in what you asked; -v shows all of it."
        )
    text = redactor.text(text)
    print(f"shardyard: {text}", file=sys.stderr)
    if arguments.json:
        described = {"error": text, "kind": type(error).__name__, "exit_code": exit_code}
        print(json.dumps(redactor.value(json.loads(json.dumps(described | vars(error), default=_plain)))))
    return exit_code


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else str(value)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as values; `key=value` may stand before or after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") for item in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Nothing heavy is imported here: `--help` has to answer at once."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON value on stdout; narration goes to stderr")
    common.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and details")
    parser = argparse.ArgumentParser(
        prog="shardyard", description="Distributed training in which nothing is lost: one file describes a run."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(group: Any, name: str, handler: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(handler=handler)
        return added

    _add_recipe_commands(commands, command)
    _add_sweep_command(commands, command)
    _add_run_commands(commands, command)
    _add_checkpoint_commands(commands, command)
    _add_data_commands(commands, command)
    doctor = command(commands, "doctor", "doctor:doctor", "check this machine: packages, devices, Ray, MLflow, disk")
    _add_store(doctor)
    _add_metrics_command(commands, command)
    _add_dashboard_commands(commands, command)
    return parser


def _add_recipe_commands(commands: Any, command: Any) -> None:
    init = command(commands, "init", "recipes:init", "write a commented recipe, and its schema for editors")
    init.add_argument("path", nargs="?", default="run.yaml", help="file to write (default: run.yaml)")
    init.add_argument("--recipe", default="language_modeling-gpt-tiny", help="recipe to start from")
    check = command(commands, "check", "recipes:check", "validate a recipe and show what it will do")
    _add_recipe(check)
    check.add_argument("--on", metavar="TARGET", default="local", help="plan for this target (default: local)")
    train = command(commands, "train", "train:train", "train a recipe; the same name launched again resumes the run")
    _add_recipe(train)
    train.add_argument("--on", metavar="TARGET", default="local", help="a target of targets.yaml (default: local)")
    train.add_argument("--dry-run", action="store_true", help="print exactly what would be submitted, and do nothing")
    train.add_argument("-d", "--detach", action="store_true", help="with --on: submit, and do not wait")
    train.add_argument(
        "--priority", type=int, default=0, help="with --on a Ray cluster: higher goes first (default: 0)"
    )
    train.add_argument("--address", help="join this Ray cluster instead of starting one here")
    train.add_argument(
        "--from",
        dest="parent",
        metavar="RUN@STEP",
        help="start from another run's checkpoint, or a Hugging Face folder",
    )
    train.add_argument(
        "--branch",
        action="store_true",
        help="with --from: take the whole state, not the weights alone",
    )


def _add_sweep_command(commands: Any, command: Any) -> None:
    sweep = command(commands, "sweep", "sweep:sweep", "train a recipe with many values; the same command again resumes")
    # One list, so that options may stand anywhere between these.
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="RECIPE grid|random|asha|pbt key=value",
        help="a recipe, how values are chosen, and each key with a value for all trials, a choice (key=a,b,c), or a "
        "range (key=lin:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH)",
    )
    sweep.add_argument("--name", help="default: the recipe's name and the algorithm")
    sweep.add_argument("--trials", type=_positive, metavar="N", help="values to draw (default: 8); a grid has its own")
    sweep.add_argument("--parallel", type=_positive, metavar="N", help="at a time at most (default: what has room)")
    sweep.add_argument("--metric", help="what is compared (default: validation/loss)")
    sweep.add_argument("--goal", choices=("min", "max"), help="whether less or more of it is better (default: min)")
    sweep.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    sweep.add_argument("--address", help="join this Ray cluster instead of starting one here")
    sweep.add_argument("--resume", metavar="NAME", help="go on with a sweep; nothing else has to be given")
    _add_store(sweep)


def _add_run_commands(commands: Any, command: Any) -> None:
    queue = command(commands, "queue", "queue:queue", "list what runs and waits at a target, and why it waits")
    queue.add_argument("--on", metavar="TARGET", help="a target of targets.yaml; not needed where there is but one")
    runs = commands.add_parser("runs", help="list, show, stop, resume runs").add_subparsers(
        metavar="COMMAND", required=True
    )
    _add_store(command(runs, "ls", "runs:ls", "list the runs of a store"))
    for name, handler, text in [
        ("show", "runs:show", "show one run: status, attempts, checkpoints, first failure"),
        ("stop", "runs:stop", "ask a run to save a checkpoint and stop"),
        ("sync", "runs:sync", "send MLflow what it has missed of a run"),
    ]:
        _add_run(command(runs, name, handler, text))
    resume = command(runs, "resume", "runs:resume", "go on with a run from its newest good checkpoint")
    _add_run(resume)
    resume.add_argument("--address", help="join this Ray cluster instead of starting one here")
    logs = command(commands, "logs", "runs:logs", "print a worker's log")
    _add_run(logs)
    logs.add_argument("--rank", type=int, default=0)
    logs.add_argument("--attempt", type=int, help="default: the latest")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as the log grows, until the run ends")
    replay = command(commands, "replay", "replay:replay", "re-run a step: is it as recorded, which examples stand out")
    _add_run(replay)
    replay.add_argument("--step", type=_positive, required=True, metavar="N", help="as in the record, counted from 1")
    replay.add_argument("--workers", type=_positive, metavar="W", help="default: as many as ran the step")
    replay.add_argument("--top", type=_positive, default=10, metavar="N", help="examples to show (default: 10)")
    replay.add_argument("--data-only", action="store_true", help="list its examples in their order; no model is run")
    generate = command(commands, "generate", "inference:generate", "continue a prompt with a trained language model")
    _add_run(generate, "RUN or RUN@STEP")
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--tokens", type=int, default=200, help="tokens to add at most (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    export = command(commands, "export", "inference:export", "write a checkpoint's weights as a Hugging Face folder")
    _add_export(export)


def _add_checkpoint_commands(commands: Any, command: Any) -> None:
    ckpt = commands.add_parser("ckpt", help="list, verify, prune, export checkpoints").add_subparsers(
        metavar="COMMAND", required=True
    )
    _add_run(command(ckpt, "ls", "checkpoints:ls", "list a run's checkpoints: size, workers, stage, evaluation"))
    verify = command(ckpt, "verify", "checkpoints:verify", "read every byte against its digest; names what is damaged")
    _add_run(verify, "RUN, for all of its checkpoints, or RUN@STEP")
    prune = command(ckpt, "prune", "checkpoints:prune", "delete older checkpoints of a run that is not running")
    _add_run(prune)
    prune.add_argument("--keep", type=_positive, required=True, metavar="N", help="the newest good ones to keep")
    prune.add_argument(
        "--every", type=_positive, metavar="STEPS", help="keep those after a multiple of so many as well"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    _add_export(command(ckpt, "export", "inference:export", "as `shardyard export`"))


def _add_export(export: argparse.ArgumentParser) -> None:
    _add_run(export, "RUN or RUN@STEP")
    export.add_argument("folder", help="folder to write; it must not exist yet")


def _add_data_commands(commands: Any, command: Any) -> None:
    data = commands.add_parser("data", help="build, inspect, verify, compare, export data sets").add_subparsers(
        metavar="COMMAND", required=True
    )
    build = command(data, "build", "data:build", "turn a recipe's source into Arrow shards, on all cores")
    _add_recipe(build)
    build.add_argument("--workers", type=_positive, help="processes at once (default: one a core; 1 starts no Ray)")
    build.add_argument("--address", help="build on this Ray cluster instead of this machine alone")
    inspect = command(data, "inspect", "data:inspect", "show columns, counts, lengths and examples")
    _add_recipe(inspect, _DATA_SET)
    inspect.add_argument("--examples", type=_positive, default=3, help="examples to show (default: 3)")
    inspect.add_argument("--out", metavar="FOLDER", help="write the pictures among the examples there, as PNG files")
    verify = command(data, "verify", "data:verify", "check every block against its digest; names what is damaged")
    _add_recipe(verify, _DATA_SET)
    diff = command(data, "diff", "data:diff", "say what differs between two data sets, down to the rows")
    diff.add_argument("a", metavar="A", help=_DATA_SET)
    diff.add_argument("b", metavar="B", help="another")
    export = command(data, "export", "data:export", "write a data set as Parquet files")
    _add_recipe(export, _DATA_SET)
    export.add_argument("--out", metavar="FOLDER", required=True, help="folder or URI to write to")


def _add_metrics_command(commands: Any, command: Any) -> None:
    metrics = command(commands, "metrics", "metrics:metrics", "tell Prometheus how the runs of a store go")
    _add_store(metrics)
    metrics.add_argument("--once", action="store_true", help="print the page and end")
    metrics.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    metrics.add_argument("--port", type=_port, default=9871, help="default: 9871; 0 takes a free one")
    metrics.add_argument("--token-file", metavar="FILE", help="who asks must show what is in it as a bearer token")


def _add_dashboard_commands(commands: Any, command: Any) -> None:
    ui = command(commands, "ui", "ui:ui", "the runs of a store in a browser")
    _add_store(ui)
    ui.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    ui.add_argument("--port", type=_port, default=9870, help="default: 9870; 0 takes a free one")
    ui.add_argument("--token-file", metavar="FILE", help="who comes must give the token in it")
    ui.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="a name that it goes by (behind a proxy); repeat"
    )

    top = command(commands, "top", "top:top", "a run in this terminal as it goes on, or all runs of a store")
    top.add_argument("run", metavar="RUN", nargs="?", help="name of the run (default: all runs of the store)")
    _add_store(top)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, from 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _add_recipe(parser: argparse.ArgumentParser, text: str = "a recipe file, or a name in configs/recipes") -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")


def _add_run(parser: argparse.ArgumentParser, text: str = "name of the run") -> None:
    parser.add_argument("run", metavar="RUN", help=text)
    _add_store(parser)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", default=DEFAULT_STORE, help="folder or URI that holds the runs (default: ./runs)")


if __name__ == "__main__":
    sys.exit(main())
