from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.json_schema import json_schema
from configs.load import RECIPES, load, recipe_names
from configs.schema import RunConfig, flatten
from configs.template import SCHEMA_FILE, commented_recipe
from configs.yaml_text import parse


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_loads_and_says_how_it_is_run(name: str) -> None:
    config = load(name).config
    head = (RECIPES / f"{name}.yaml").read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"shardyard train {name}" in head and "Size:" in head and "Hardware:" in head
    assert name.startswith(f"{config.task.name}-{config.model.name}-")
    # No slot of a step is idle on the workers that the recipe asks for.
    assert config.num_micro_batches % config.resources.workers == 0


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_heads_tell_the_size_of_a_step(name: str) -> None:
    config = load(name).config
    head = (RECIPES / f"{name}.yaml").read_text().partition("\n\n")[0]
    told = re.search(r"([0-9,]+) (\w+)(?: of [0-9x ]+)? a step", head)
    assert told is not None
    each = config.task.settings["seq_len"] if told[2] == "tokens" else 1
    assert int(told[1].replace(",", "")) == config.batch.global_batch_size * each


@pytest.mark.parametrize("name", recipe_names())
def test_the_commented_recipe_is_the_same_run_with_every_setting_shown(name: str, tmp_path: Path) -> None:
    text = commented_recipe(name)
    assert text.splitlines()[0] == f"# yaml-language-server: $schema=./{SCHEMA_FILE}"
    file = tmp_path / "run.yaml"
    file.write_text(text)
    resolved = load(file)
    assert resolved.config == load(name).config
    assert "default" not in resolved.origins.values()
    lines = text.splitlines()
    for key, field in RunConfig.model_fields.items():
        position = next(number for number, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[position - 1].startswith("# ") and field.description


def test_the_schema_for_editors_knows_every_setting_and_is_as_strict() -> None:
    schema = json_schema()
    for key in flatten(load("language_modeling-gpt-tiny").config.model_dump()):
        section = schema
        for part in key.split("."):
            section = _resolve(schema, section)
            if section.get("additionalProperties") is True:
                break  # settings of task, model and data
            assert section["additionalProperties"] is False
            assert "description" in _resolve(schema, section["properties"][part]) | section["properties"][part]
            section = section["properties"][part]
    assert schema["required"] == ["name", "steps", "task", "model", "data", "batch", "optimizer"]
    assert schema["properties"]["precision"]["enum"] == ["fp32", "bf16", "fp16"]


def test_examples_in_the_schema_are_accepted() -> None:
    required = {name: field for name, field in RunConfig.model_fields.items() if field.is_required()}
    config = load({name: field.examples[0] for name, field in required.items() if field.examples}).config
    assert config.steps == 1000


def test_recipes_have_no_line_that_yaml_reads_otherwise() -> None:
    for name in recipe_names():
        assert parse((RECIPES / f"{name}.yaml").read_text()).problems == []


def _resolve(schema: dict, section: dict) -> dict:
    reference = section.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else section
