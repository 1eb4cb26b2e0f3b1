"""Text to tokens on disk: the product's build against datasets.map(batched=True, num_proc=2), the same tokenizer.

Both begin with the same JSON lines files and end with Arrow files. Ray's start is timed apart: it does not grow with
the data. `python benchmarks/text_build.py KIND FOLDER` is one run, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders import Bench

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 16_384
KINDS = ("shardyard-in-process", "shardyard-1", "shardyard-2", "datasets-2")
TIMEOUT_S = 240


def measure_text(bench: Bench) -> dict[str, Any]:
    folder = bench.folder / "text"
    num_bytes = write_corpus(folder, (1 << 20) if bench.quick else (144 << 20))
    call("tokenizer", folder)
    kinds = [kind for kind in KINDS if kind != "datasets-2" or "hf_datasets" in bench.peers]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for turn in range(1 if bench.quick else 2):
        for kind in kinds if turn % 2 == 0 else kinds[::-1]:
            runs[kind].append(call(kind, folder))
    shutil.rmtree(folder)
    best = {
        kind: {name: statistics.median(run[name] for run in results) for name in results[0]}
        for kind, results in runs.items()
    }
    return {"text": {"text_bytes": num_bytes, "vocab_size": VOCAB_SIZE, "runs": best}}


def call(kind: str, folder: Path) -> Any:
    command = [sys.executable, str(Path(__file__)), kind, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def write_corpus(folder: Path, limit_bytes: int) -> int:
    """This Python's own sources and those of its packages as JSON lines of text; bytes of text."""
    folder.mkdir(parents=True)
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    paths += sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    num_bytes, number = 0, 0
    while num_bytes < limit_bytes:
        with (folder / f"texts-{number:02d}.jsonl").open("w") as file:
            number += 1
            for path in paths:
                text = path.read_text("utf-8", "ignore")
                if text and num_bytes < limit_bytes:
                    file.write(json.dumps({"text": text}) + "\n")
                    num_bytes += len(text.encode())
    return num_bytes


def train_tokenizer(folder: Path) -> dict[str, float]:
    from data_pipelines.tokenizer import TokenizerConfig
    from data_pipelines.tokenizer import train_tokenizer as train

    with next(iter(sorted(folder.glob("*.jsonl")))).open() as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(400), file, strict=False)]
    tokenizer = train(TokenizerConfig(vocab_size=VOCAB_SIZE), iter(texts))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return {"vocab_size": tokenizer.vocab_size}


def build(folder: Path, workers: int | None) -> dict[str, float]:
    """workers None: in this process, without Ray."""
    from configs.schema import Plugin
    from data_pipelines.build import ensure_dataset
    from data_pipelines.storage import Store
    from data_pipelines.tokenizer import TokenizerConfig

    data = Plugin(name="jsonl", paths=tuple(str(path) for path in sorted(folder.glob("*.jsonl"))))  # type: ignore[call-arg]
    config = TokenizerConfig(vocab_size=VOCAB_SIZE, file=str(folder / "tokenizer.json"))
    store = Store(folder / f"store-{workers}")
    start_s = 0.0
    if workers is None:
        started = time.perf_counter()
        dataset = ensure_dataset(store, data, config)
        elapsed = time.perf_counter() - started
    else:
        from cluster.ray_build import RayTasks

        with RayTasks(workers=workers) as tasks:
            started = time.perf_counter()
            list(tasks(abs, [1] * workers))
            start_s = time.perf_counter() - started
            started = time.perf_counter()
            dataset = ensure_dataset(store, data, config, run_tasks=tasks)
            elapsed = time.perf_counter() - started
    tokens = sum(int(dataset.split(name).blocks.tokens.sum()) for name in dataset.splits)
    disk = sum(path.stat().st_size for path in Path(dataset.path).iterdir() if path.name != "tokenizer.json")
    shutil.rmtree(folder / f"store-{workers}")
    return {"seconds": elapsed, "ray_start_s": start_s, "tokens": tokens, "disk_over_tokens": disk / (2 * tokens)}


def build_with_datasets(folder: Path) -> dict[str, float]:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    started = time.perf_counter()
    texts = datasets.load_dataset(
        "json", data_files=[str(path) for path in sorted(folder.glob("*.jsonl"))], split="train"
    )
    read_s = time.perf_counter() - started
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))})

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"tokens": [one.ids for one in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    tokens = texts.map(encode, batched=True, num_proc=2, remove_columns=["text"], features=features)
    elapsed = time.perf_counter() - started
    count = sum(
        len(part) for column in [tokens.data.column("tokens")] for part in (chunk.values for chunk in column.chunks)
    )
    shutil.rmtree(folder / "hf", ignore_errors=True)
    return {"seconds": elapsed, "map_s": elapsed - read_s, "tokens": count}


def main(kind: str, folder: Path) -> dict[str, float]:
    if kind == "tokenizer":
        return train_tokenizer(folder)
    if kind == "datasets-2":
        return build_with_datasets(folder)
    return build(folder, {"shardyard-1": 1, "shardyard-2": 2}.get(kind))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
