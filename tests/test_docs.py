"""What the documents say is there: commands parse, paths exist, links lead somewhere, formats read as described."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import build_parser
from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.mixture import Change, Schedule
from data_pipelines.order import BlockOrder, ExampleOrder
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines.conftest import sample_texts, write_jsonl
from tests.data_pipelines.small_sets import some_rows, write_set

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md", "deploy/**/*.md")
    for page in ROOT.glob(pattern)
)
# The text of `...`, but not of a fenced block; a code span may be broken over lines.
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
# Folders of a checkout; what is named in them has to be there.
FOLDERS = ("configs", "data_pipelines", "trainer", "cluster", "tests", "docs", "benchmarks", "deploy", ".ci")
SOURCE_SUFFIXES = (".py", ".md", ".svg", ".toml")
PLACEHOLDER = re.compile(r"[<>{}*]|\.\.\.|\b(NAME|TASK|RUN|STORE|KIND)\b")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def spans(page: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text_of(page)))]


def command_lines(page: str) -> list[str]:
    lines = [line for body in fenced(page, "bash", "sh") for line in body.replace("\\\n", " ").splitlines()]
    return [line.strip().removeprefix("$ ") for line in [*lines, *spans(page)]]


def paths_named(page: str) -> set[str]:
    """What looks like a file or folder of the repository, without a `:line` or a trailing slash."""
    found = set()
    for span in spans(page):
        if " " in span or PLACEHOLDER.search(span):
            continue
        first, slash, _ = span.partition("/")
        in_folder = bool(slash) and (first in FOLDERS or span.endswith(SOURCE_SUFFIXES))
        at_root = re.fullmatch(r"[A-Z]+\.md|Makefile|LICENSE|pyproject\.toml|constraints\.txt", span) is not None
        if in_folder or at_root:
            found.add(span.partition(":")[0].rstrip("/"))
    return found


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_found() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md"} <= set(PAGES)
    assert len(paths_named("ARCHITECTURE.md")) > 20
    assert sum(line.startswith("shardyard ") for line in command_lines("README.md")) > 10


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    assert sorted(path for path in paths_named(page) if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for target in (first or second for first, second in LINK.findall(FENCE.sub("", text_of(page)))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for line in command_lines(page):
        words = shlex.split(line, comments=True) if line.startswith("shardyard ") else []
        try:
            if len(words) > 1:
                build_parser().parse_args(words[1:])
        except SystemExit as end:
            if end.code:
                wrong.append(f"{line}: {capsys.readouterr().err.splitlines()[-1]}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in command_lines(page) if re.match(r"make [a-z]", line)}
    assert named - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page: str) -> None:
    for body in fenced(page, "python"):
        compile(body, page, "exec")


def test_every_decision_is_listed() -> None:
    index = text_of("docs/adr/README.md")
    decisions = sorted(page.name for page in (ROOT / "docs/adr").glob("0*.md"))
    assert [name for name in decisions if f"({name})" not in index] == []
    assert [int(name[:4]) for name in decisions] == list(range(1, len(decisions) + 1))


def test_the_configuration_page_is_what_the_schema_says() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_configuration.py"))["page"]()
    assert text_of("docs/configuration.md") == page, "run: python docs/make_configuration.py"


# --- the formats: the readers that the pages print, against the product's own


def reader(page: str) -> dict[str, Any]:
    """What the Python of a page defines."""
    names: dict[str, Any] = {}
    for body in fenced(page, "python"):
        exec(compile(body, f"<{page}>", "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_data_page_reads_tokens(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.writer.BLOCK_BYTES", 2000)
    source: Plugin = write_jsonl(tmp_path / "rows.jsonl", sample_texts())
    tokenizer = TokenizerConfig.model_validate({"name": kind} if kind == "bytes" else {"vocab_size": 300})
    dataset = ensure_dataset(Store(tmp_path / "store"), source, tokenizer)
    folder, page = Path(dataset.path), reader("docs/data.md")

    for split in dataset.splits:
        assert len(dataset.index.splits[split]) >= 1
        documents = [
            (row["key"], row["tokens"][1:], row["num_bytes"])
            for block in page["blocks"](folder, split)
            for row in block
        ]
        assert documents == [(key, tokens.tolist(), size) for key, tokens, size in dataset.documents(split)]
        sequences, packed = list(page["sequences"](folder, split, 16)), dataset.packed(split, 16)
        assert len(sequences) == len(packed)
        found = packed.gather(np.arange(len(packed)))
        for tokens, expected, valid in zip(sequences, found["tokens"], found["valid"], strict=True):
            assert tokens == expected[: valid + 1].tolist()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_data_page_reads_columns_of_every_kind(
    tmp_path: Path, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.writer.BLOCK_BYTES", 2000)
    rows = some_rows(60)
    write_set(tmp_path, {"train": rows, "validation": []}, compression=compression)
    page = reader("docs/data.md")
    found = [row for block in page["blocks"](tmp_path, "train") for row in block]
    assert list(page["blocks"](tmp_path, "validation")) == []
    for got, want in zip(found, rows, strict=True):
        for name, value in want.items():
            flat = value.reshape(-1) if name == "image" else value
            assert got[name] == (flat.tolist() if isinstance(flat, np.ndarray) else flat)
    for name in ("tokens", "audio", "raw", "caption"):
        values = [row[name].encode() if name == "caption" else row[name] for row in rows]
        assert page["lengths"](tmp_path, "train", name) == list(map(len, values))
    assert page["lengths"](tmp_path, "validation", "raw") == []


@pytest.mark.parametrize("seed", [0, 1337, -1, 2**63 - 1])
@pytest.mark.parametrize("num_examples", [1, 2, 3, 10, 1000, 2**32, 2**32 + 1, 2**40])
def test_the_data_page_tells_the_order_of_examples(seed: int, num_examples: int) -> None:
    example_at = reader("docs/data.md")["example_at"]
    positions = np.arange(min(3 * num_examples, 300))
    expected = ExampleOrder(seed, num_examples).sample_ids(positions).tolist()
    assert [example_at(position, seed, num_examples) for position in positions.tolist()] == expected


@pytest.mark.parametrize("seed", [0, -1])
@pytest.mark.parametrize("window_blocks", [1, 3, 64])
def test_the_data_page_tells_the_order_of_blocks(seed: int, window_blocks: int) -> None:
    block_example_at = reader("docs/data.md")["block_example_at"]
    sizes = [5, 1, 9, 2, 7, 3, 4]
    positions = np.arange(3 * sum(sizes))
    expected = BlockOrder(seed, np.array(sizes), window_blocks).sample_ids(positions).tolist()
    assert [block_example_at(position, seed, sizes, window_blocks) for position in positions.tolist()] == expected


@pytest.mark.parametrize("num_blocks", [4_097, 32_769, 70_000])
def test_the_data_page_tells_the_order_of_many_blocks(num_blocks: int) -> None:
    block_example_at = reader("docs/data.md")["block_example_at"]
    sizes = [3 + number % 5 for number in range(num_blocks)]
    total = sum(sizes)
    positions = [total + total // 3, 2 * total - 1]
    expected = BlockOrder(11, np.array(sizes)).sample_ids(np.array(positions)).tolist()
    assert [block_example_at(position, 11, sizes, 128) for position in positions] == expected


@pytest.mark.parametrize(
    ("weights", "most", "changes"),
    [
        ([3, 2], [None, None], {}),
        ([1, 1, 1], [None, 70, None], {50: [0, 1, 3], 400: [1, 0, 0]}),
        ([0.00001, 5, 1 / 3], [None, 1000, 40], {900: [1, 1, 1]}),
    ],
)
def test_the_data_page_tells_mixtures(
    weights: list[float], most: list[int | None], changes: dict[int, list[float]]
) -> None:
    mixture_at = reader("docs/data.md")["mixture_at"]
    schedule = Schedule(weights, most, [Change(at, tuple(new)) for at, new in changes.items()])
    for position in [0, 1, 49, 50, 51, 399, 400, 401, 899, 900, 2_500, 12_345]:
        sources, numbers = schedule(np.array([position]))
        assert mixture_at(position, weights, most, changes) == (int(sources[0]), int(numbers[0])), position


def test_the_checkpoint_format_page_reads_a_checkpoint(tmp_path: Path) -> None:
    """Two ranks, one parameter cut between them, a frozen bf16 one, a buffer, an empty one, more than one block."""
    import torch

    from trainer.checkpoint_files import CheckpointReader, tensor_key, write_manifest, write_part

    torch.manual_seed(0)
    full = {"weight": torch.randn(700, 501), "frozen": torch.randn(5, 3).bfloat16(), "count": torch.tensor([7])}
    state = {"master": full["weight"], "exp_avg": torch.randn(700, 501), "exp_avg_sq": torch.rand(700, 501)}
    store, cut, numel = Store(tmp_path / "step-00000003"), 12_345, full["weight"].numel()
    for rank, (start, stop) in enumerate([(0, cut), (cut, numel)]):
        tensors = {
            tensor_key(kind, "weight", start): values.reshape(-1)[start:stop].clone() for kind, values in state.items()
        }
        ranges = {"weight": [[start, stop]]}
        if rank == 0:
            tensors |= {"frozen/frozen/0": full["frozen"].reshape(-1), "buffer/count/0": full["count"]}
            ranges |= {"frozen": [[0, 15]], "count": [[0, 1]]}
        write_part(store, rank, "0a1b2c3d-000001", tensors, ranges)
    header = {
        "step": 3,
        "save": "0a1b2c3d-000001",
        "parameters": {
            "weight": {"shape": [700, 501], "dtype": "float32", "frozen": False},
            "frozen": {"shape": [5, 3], "dtype": "bfloat16", "frozen": True},
            "nothing": {"shape": [0, 4], "dtype": "float32", "frozen": True},
        },
        "buffers": {"count": {"shape": [1], "dtype": "int64"}},
        "aliases": {},
        "scalars": {"optimizer": "AdamW", "kinds": ["exp_avg", "exp_avg_sq"], "optimizer_scalars": {"step": 3.0}},
        "data": {"examples_seen": 24, "fingerprint": "ü"},
    }
    parts = [store.read_bytes(f"rank-0000{rank}-0a1b2c3d-000001.json") for rank in (0, 1)]
    write_manifest(store, header, [json.loads(part) for part in parts])
    assert CheckpointReader(store).verify() == []

    found = reader("docs/checkpoint-format.md")["read_checkpoint"](tmp_path / "step-00000003")
    for kind, values in state.items():
        assert torch.equal(torch.from_numpy(found[kind]["weight"].copy()), values)
    assert torch.equal(torch.from_numpy(found["frozen"]["frozen"].copy()), full["frozen"].float())
    assert found["frozen"]["nothing"].shape == (0, 4)
    assert found["buffer"]["count"].tolist() == [7]
