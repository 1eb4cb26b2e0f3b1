from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.duration import Interval, parse_interval
from configs.load import load
from configs.schema import Plugin, RunConfig, Section, flatten
from tests.configs.minimal import minimal


def test_accumulation_covers_the_batch_at_every_world_size() -> None:
    for global_size in range(1, 12):
        for micro in range(1, global_size + 1):
            config = load(minimal(batch={"global_batch_size": global_size, "micro_batch_size": micro})).config
            slices = [range(start, min(start + micro, global_size)) for start in range(0, global_size, micro)]
            assert config.num_micro_batches == len(slices)
            for world_size in range(1, 8):
                longest = max(len(slices[rank::world_size]) for rank in range(world_size))
                assert config.accumulation(world_size) == longest


def test_plugin_keeps_all_but_the_name_even_names_of_its_own_methods() -> None:
    settings = {"settings": 1, "model_dump": [2], "copy": {"a": 3}}
    plugin = Plugin.model_validate({"name": "x", **settings})
    assert plugin.name == "x"
    assert plugin.settings == settings


def test_sections_are_frozen() -> None:
    config = load(minimal()).config
    with pytest.raises(ValidationError):
        config.steps = 3
    with pytest.raises(ValidationError):
        config.optimizer.lr = 3.0


def test_rules_hold_for_configs_built_in_python_too() -> None:
    with pytest.raises(ValidationError, match="no fp32 master weights"):
        RunConfig.model_validate(minimal(zero={"stage": 0}, precision="bf16"))


def test_lists_become_tuples_only_where_a_tuple_is_declared() -> None:
    class Example(Section):
        fixed: tuple[float, float]
        any_length: tuple[str, ...] | None = None
        listed: list[int]

    example = Example.model_validate({"fixed": [1, 2], "any_length": ["a"], "listed": [3]})
    assert (example.fixed, example.any_length, example.listed) == ((1.0, 2.0), ("a",), [3])


@pytest.mark.parametrize("model", [RunConfig, *RunConfig.model_fields])
def test_every_setting_is_described(model: type[RunConfig] | str) -> None:
    fields = RunConfig.model_fields
    if isinstance(model, str):
        section = fields[model].annotation
        fields = section.model_fields if isinstance(section, type) and issubclass(section, Section) else {}
    assert all(field.description for field in fields.values())


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        (1, Interval(steps=1)),
        (500, Interval(steps=500)),
        ("90s", Interval(seconds=90.0)),
        ("10m", Interval(seconds=600.0)),
        ("1.5h", Interval(seconds=5400.0)),
        ("1h30m", Interval(seconds=5400.0)),
        ("1d", Interval(seconds=86400.0)),
    ],
)
def test_intervals(value: int | str, interval: Interval) -> None:
    assert parse_interval(value) == interval
    assert load(minimal(checkpoint={"every": value})).config.checkpoint.interval == interval


@pytest.mark.parametrize("value", [0, -5, True, None, 1.5, "", "90", "0s", "10 m", "m", "10x", "-1h", "1h 30m", [1]])
def test_other_intervals_are_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match=r"10m|90s"):
        parse_interval(value)


@given(st.integers(0, 1000), st.integers(0, 59), st.integers(0, 59))
def test_intervals_add_their_parts(hours: int, minutes: int, seconds: int) -> None:
    total = hours * 3600 + minutes * 60 + seconds
    if total:
        assert parse_interval(f"{hours}h{minutes}m{seconds}s") == Interval(seconds=total)


def test_flatten_keeps_lists_and_empty_mappings_whole() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}
