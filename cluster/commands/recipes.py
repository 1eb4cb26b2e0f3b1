"""`shardyard init` and `shardyard check`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.output import facts, say
from configs.errors import UsageError
from configs.json_schema import json_schema
from configs.template import SCHEMA_FILE, commented_recipe


def init(arguments: Namespace) -> dict[str, Any]:
    """Write a commented recipe, and beside it the JSON schema by which editors complete and check it."""
    path = Path(arguments.path)
    if path.exists():
        raise UsageError(f"{path} exists already and is left as it is. Name another file: `shardyard init other.yaml`.")
    text = commented_recipe(arguments.recipe)
    schema = path.parent / SCHEMA_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        schema.write_text(json.dumps(json_schema(), indent=2) + "\n")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Choose a folder that you may write to."
        ) from error
    say(arguments, f"Wrote {path} and {schema}. Next: shardyard check {path}, then shardyard train {path}")
    return {"recipe": str(path), "schema": str(schema)}


def check(arguments: Namespace) -> dict[str, Any]:
    """Validate a recipe with every file it names, and show what a run of it will do, and take at the target.

    Raises:
        UsageError: it cannot fit there; with the cheapest change that does.
    """
    from configs.targets import LocalTarget, load_target
    from trainer.cheapest import refuse_what_cannot_fit
    from trainer.plan import estimate
    from trainer.site import NotPlanned, site_of
    from trainer.validate import load_recipe, validate

    target = load_target(arguments.on)
    plan = validate(load_recipe(arguments.recipe, arguments.overrides))
    described, warnings = plan.describe(), plan.warnings()
    facts(arguments, described)
    try:
        found = estimate(plan, site_of(plan.config, target.device, here=isinstance(target, LocalTarget)))
    except NotPlanned as error:
        warnings.append(str(error))
    else:
        say(arguments, f"\n{found.table()}")
        refuse_what_cannot_fit(found)
        described |= {"plan": found.describe()}
    for warning in warnings:
        say(arguments, f"warning: {warning}")
    return described | {"warnings": warnings}
