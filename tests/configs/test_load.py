from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from configs.errors import NotFound, UsageError
from configs.load import ConfigError, Problem, Resolved, dump, load, load_resolved, recipe_names, validate_plugin
from configs.problems import where
from configs.schema import Section, flatten
from tests.configs.minimal import minimal
from tests.configs.test_yaml_text import KEYS, VALUES

RECIPE = """\
name: demo
steps: 400

task: {name: language_modeling, seq_len: 256, tokenizer: {name: bpe, vocab_size: 4096}}
model: {name: gpt, num_layers: 4}
data: {name: python_stdlib}
batch:
  global_batch_size: 16
  micro_batch_size: 8
optimizer:
  lr: 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = Path("demo.yaml")
    file.write_text(RECIPE)
    return file


def problems_of(recipe: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value) and "Input should" not in str(caught.value)
    return str(caught.value).splitlines()


def test_values_and_their_origins(recipe: Path) -> None:
    resolved = load(recipe, ["steps=7", "model.num_heads=2", "zero.stage=2"])
    assert resolved.path == "demo.yaml"
    assert (resolved.config.steps, resolved.config.optimizer.lr, resolved.config.zero.stage) == (7, 1e-3, 2)
    assert resolved.config.model.settings == {"num_layers": 4, "num_heads": 2}
    assert set(resolved.origins) == set(flatten(resolved.config.model_dump()))
    expected = {
        "name": "demo.yaml:1",
        "steps": "command line",
        "task.tokenizer.vocab_size": "demo.yaml:4",
        "model.num_layers": "demo.yaml:5",
        "model.num_heads": "command line",
        "batch.micro_batch_size": "demo.yaml:9",
        "optimizer.lr": "demo.yaml:11",
        "optimizer.eps": "default",
        "zero.stage": "command line",
        "zero.offload_optimizer": "default",
        "parent": "default",
    }
    assert {key: resolved.origins[key] for key in expected} == expected


def test_all_problems_come_at_once_with_their_lines(recipe: Path) -> None:
    recipe.write_text(
        RECIPE.replace("steps: 400", "stepps: 400").replace("micro_batch_size: 8", "micro_batch_size: 32")
        + "zero: {stagee: 1, stage: 0}\nprecision: bf16\nlr: 3\n"
    )
    assert problems_of(recipe, "resources.workers=two") == [
        "demo.yaml:1 steps: missing; add it, for example: steps: 1000 (Optimizer steps of the whole run)",
        "demo.yaml:2 stepps: unknown key; did you mean 'steps'?",
        "demo.yaml:9 batch.micro_batch_size: batch.micro_batch_size=32 is larger than batch.global_batch_size=16: "
        "micro-batches are pieces of the global batch. Use batch.micro_batch_size=16 or less, or a larger global "
        "batch.",
        "demo.yaml:12 zero.stage: zero.stage=0 with precision=bf16 keeps no fp32 master weights (DeepSpeed 0.19). "
        "Use zero.stage=1, or precision=fp32.",
        "demo.yaml:12 zero.stagee: unknown key; did you mean 'stage'?",
        "demo.yaml:14 lr: unknown key here; did you mean 'optimizer.lr'?",
        "command line resources.workers: 'two' is text; a whole number is needed (Training processes, one device each)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=1e2", "100.0 is a number; a whole number is needed: write 100"),
        ("steps=1_000", "'1_000' is text; a whole number is needed: write 1000, without quotes"),
        ("steps=true", "true is a true/false value; a whole number is needed (Optimizer steps of the whole run)"),
        ("steps=", "it is null; a whole number is needed (Optimizer steps of the whole run)"),
        ("steps=0", "0 is out of range; it must be at least 1"),
        ("optimizer.lr='3'", "'3' is text; a number is needed: write 3, without quotes"),
        ("optimizer.lr=.inf", ".inf is not a finite number; give one"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "[0.9, 0.9, 0.9] has 3 values; give at most 2"),
        ("optimizer.eps=0", "0 is out of range; it must be more than 0.0"),
        ("zero.stage=true", "true is a true/false value; a whole number is needed"),
        ("zero.stage=1.0", "1.0 is a number; a whole number is needed: write 1"),
        ("zero.stage=4", "4 is out of range; it must be at most 3"),
        ("zero.offload_optimizer=yes", "'yes' is text; true or false is needed: write true"),
        ("precision=BF16", "'BF16' is not one of fp32, bf16, fp16; did you mean 'bf16'?"),
        ("name=12", '12 is a whole number; text is needed: put it in quotes: "12"'),
        ("name=My Run", "'My Run' cannot name a run; use at most 63 lower-case letters"),
        ("store=''", "'' is too short; give at least 1 character"),
        ("model=gpt", "'gpt' is text; a mapping is needed: write model: {name: gpt}"),
        ("batch=", "null is not a mapping; give the keys of this section"),
        ("checkpoint.every='90'", "'90' is text; for steps write 90 without quotes, for seconds 90s"),
        ("checkpoint.every=10 min", "'10 min' is neither a number of steps nor a time"),
        ("seed=[1", "not valid YAML: expected ',' or ']'"),
        ("zero.every=1", "did you mean 'evaluation.every', 'checkpoint.every' or 'tracking.every'?"),
        ("nothing_like_it=1", "unknown key; remove it, or use one of: name, seed, steps,"),
        ("schedule.decay_steps=5", "schedule.decay_steps=5 with schedule.name=cosine has no effect"),
        ("schedule.warmup_steps=500", "schedule.warmup_steps=500 is longer than the run (steps=100)"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9 with optimizer.name=adamw has no effect"),
        ("schedule={name: wsd, warmup_steps: 60, decay_steps: 50}", "Use schedule.decay_steps=40 or less"),
        ("zero={stage: 0, offload_optimizer: true}", "only a partitioned optimizer can be kept in CPU memory"),
    ],
)
def test_messages_give_value_rule_and_remedy(override: str, message: str) -> None:
    (problem,) = problems_of(minimal(), override)
    key = override.partition("=")[0]
    assert problem.startswith(f"command line {key}")
    assert message in problem


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", ".a=1", "", "--steps"])
def test_what_is_no_override_is_refused(override: str) -> None:
    (problem,) = problems_of(minimal(), override)
    assert problem.startswith("command line: ") and "write key=value" in problem


def test_an_invalid_item_of_a_list_is_named(recipe: Path) -> None:
    recipe.write_text(RECIPE + "  betas: [0.9,\n    x]\n")
    (problem,) = problems_of(recipe)
    assert problem.startswith("demo.yaml:12 optimizer.betas[1]: 'x' is text; a number is needed")


def test_overrides_apply_in_order_and_create_what_is_missing() -> None:
    config = load(minimal(), ["parent.checkpoint=a=b", "steps=3", "steps=4", "model={name: x, a: {b: 1}}"]).config
    assert config.parent is not None and config.parent.checkpoint == "a=b"
    assert config.steps == 4
    assert config.model.model_dump() == {"name": "x", "a": {"b": 1}}


def test_a_mapping_is_not_changed_and_says_python() -> None:
    mapping = minimal(optimizer={"lr": 1, "betas": (0.8, 0.9)})
    before = repr(mapping)
    resolved = load(mapping, ["model.deep.key=1"])
    assert repr(mapping) == before
    assert (resolved.path, resolved.origins["steps"], resolved.origins["seed"]) == (None, "python", "default")
    assert problems_of(minimal(steps="x", **{"a.b": 1})) == [
        "python a.b: a key holds no dots in a file; write it nested: a: {b: ...}",
        "python steps: 'x' is text; a whole number is needed (Optimizer steps of the whole run)",
    ]


def test_a_config_can_be_changed_by_overrides() -> None:
    config = load(minimal(), ["zero.stage=2"]).config
    changed = load(config, ["steps=5"])
    assert changed.config == config.model_copy(update={"steps": 5})
    assert changed.origins["zero.stage"] == "python" and changed.origins["zero.offload_optimizer"] == "default"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("language_modeling-gpt-tny", "language_modeling-gpt-tiny"),
        ("dmo.yaml", "demo.yaml"),
        ("./demo.yml", "demo.yaml"),
    ],
)
def test_a_missing_file_is_answered_with_the_nearest(recipe: Path, name: str, suggestion: str) -> None:
    with pytest.raises(NotFound) as caught:
        load(name)
    assert f"Did you mean '{suggestion}'?" in str(caught.value)
    assert all(known in str(caught.value) for known in recipe_names())
    assert caught.value.exit_code == 4


def test_unreadable_files_are_refused_in_a_sentence(recipe: Path) -> None:
    Path("latin.yaml").write_bytes(b"name: \xff")
    Path("folder").mkdir()
    Path("empty.yaml").write_text("# nothing\n")
    Path("list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match=r"latin\.yaml is not UTF-8 text \(byte 6\)"):
        load("latin.yaml")
    with pytest.raises(UsageError, match="folder is a folder"):
        load(Path("folder"))
    assert problems_of("empty.yaml")[0].startswith("empty.yaml: it is empty")
    assert problems_of("list.yaml")[0].startswith("list.yaml: [1] is not a mapping")


def test_a_file_with_a_byte_order_mark_is_read(recipe: Path) -> None:
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load(recipe).config.name == "demo"


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "store": st.text(min_size=1),
        "model": st.dictionaries(KEYS.filter(lambda key: key != "name"), VALUES, max_size=4).map(
            lambda settings: {**settings, "name": "gpt"}
        ),
        "optimizer": st.builds(
            lambda lr, betas: {"lr": lr, "betas": list(betas)},
            st.floats(0, allow_infinity=False) | st.integers(0, 5),
            st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        ),
        "checkpoint": st.fixed_dictionaries({"every": st.sampled_from([1, 500, "90s", "1h30m"])}),
        "tracking": st.fixed_dictionaries({"mlflow": st.none() | st.text(min_size=1)}),
        "parent": st.none() | st.fixed_dictionaries({"checkpoint": st.text(min_size=1)}),
    },
)


@settings(max_examples=20, deadline=None)
@given(CONFIGS, st.data())
def test_a_resolved_config_is_written_and_read_back_exactly(changes: dict[str, Any], data: st.DataObject) -> None:
    resolved = load(minimal(**changes))
    origins = {key: data.draw(st.sampled_from([origin, "a b.yaml:3", '"', " x ", "\n"]), key)
               for key, origin in resolved.origins.items()}  # fmt: skip
    resolved = Resolved(resolved.config, origins, data.draw(st.none() | st.text(), "path"))
    text = dump(resolved)
    again = load_resolved(text)
    assert again == resolved
    assert repr(again) == repr(resolved)
    assert dump(again) == text


def test_a_dump_is_also_plain_yaml_and_a_recipe(recipe: Path) -> None:
    resolved = load(recipe, ["steps=3"])
    Path("run.yaml").write_text(dump(resolved))
    assert yaml.safe_load(dump(resolved))["steps"] == 3
    assert load("run.yaml").config == resolved.config


def test_a_damaged_dump_is_refused_with_its_line(recipe: Path) -> None:
    text = dump(load(recipe)).replace("steps: 400", "steps: many")
    with pytest.raises(ConfigError, match=r"run\.yaml:5 steps: 'many' is text"):
        load_resolved(text)


def test_values_added_by_hand_to_a_dump_get_their_line(recipe: Path) -> None:
    text = dump(load(recipe)) + "\n"
    number = text.split("\n").index("seed: 0  # default") + 1
    assert load_resolved(text.replace("seed: 0  # default", "seed: 1")).origins["seed"] == f"run.yaml:{number}"


def test_one_fault_is_told_once(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("400", "!!int many"))
    assert problems_of(recipe) == [
        "demo.yaml:2 steps: many cannot be read as int; remove the tag, or correct the value"
    ]


def test_a_replaced_section_is_the_command_lines(recipe: Path) -> None:
    assert problems_of(recipe, "batch={micro_batch_size: 1}") == [
        "command line batch.global_batch_size: missing; add it, for example: global_batch_size: 32 "
        "(Examples a step, over all workers)"
    ]


def test_origins_of_our_recipes_do_not_tell_where_they_are_installed(recipe: Path) -> None:
    resolved = load("language_modeling-gpt-tiny")
    assert resolved.origins["seed"].startswith("configs/recipes/language_modeling-gpt-tiny.yaml:")
    assert resolved.path is not None and load(resolved.path) == resolved


class Tokenizer(Section):
    """Part of an example of a plug-in's settings."""

    vocab_size: int = Field(default=256, ge=2, description="Number of tokens.")


class PluginConfig(Section):
    """An example of a plug-in's settings."""

    seq_len: int = Field(description="Tokens of one example.", examples=[256])
    tokenizer: Tokenizer = Tokenizer()
    mode: int | str | None = None


def test_plugin_settings_give_the_same_messages(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("seq_len: 256", "seqlen: 256, mode: {a: 1}"))
    resolved = load(recipe, ["task.tokenizer={vocab_sise: 4}"])
    section, problems = validate_plugin(PluginConfig, resolved.config.task, "task", resolved.origins)
    assert section is None
    assert sorted(str(problem) for problem in problems) == [
        "command line task.tokenizer.vocab_sise: unknown key; did you mean 'vocab_size'?",
        "demo.yaml:4 task.mode: {a: 1} is a mapping; a whole number is needed; or: {a: 1} is a mapping; text is needed",
        "demo.yaml:4 task.seq_len: missing; add it, for example: seq_len: 256 (Tokens of one example)",
        "demo.yaml:4 task.seqlen: unknown key; did you mean 'seq_len'?",
    ]


def test_right_plugin_settings_give_the_section() -> None:
    resolved = load(minimal(task={"name": "x", "seq_len": 3, "tokenizer": {"vocab_size": 9}}))
    section, problems = validate_plugin(PluginConfig, resolved.config.task, "task", resolved.origins)
    assert problems == []
    assert section == PluginConfig(seq_len=3, tokenizer=Tokenizer(vocab_size=9))


def test_problems_are_sorted_by_file_and_line_without_repeats() -> None:
    problems = [Problem("command line", "a", "x"), Problem("b.yaml:10", "b", "x"), Problem("b.yaml:9", "c", "x")]
    assert ConfigError([*problems, *problems]).problems == (problems[2], problems[1], problems[0])


def test_the_place_of_a_key_is_its_own_or_the_nearest() -> None:
    origins = {"a.b": "default", "a.c": "f:2", "d": "f:9"}
    assert where("a.c", origins, "f:1") == "f:2"
    assert where("a.missing", origins, "f:1") == "f:2"
    assert where("e.f", origins, "f:1") == "f:1"


def test_reading_configs_loads_nothing_heavy() -> None:
    code = "import sys, configs.load, configs.plugins, configs.template; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "pyarrow", "ray", "mlflow", "deepspeed", "transformers", "trainer", "cluster", "asyncio"}
    assert not heavy & set(loaded)
