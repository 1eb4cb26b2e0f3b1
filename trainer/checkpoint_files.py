"""A checkpoint's files: named fragments that depend on no ZeRO stage and no world size.

    step-00000500/
      rank-00000-<save>.safetensors   the fragments that rank 0 held; a tensor's key is "<kind>/<name>/<start>"
      rank-00001-<save>.safetensors
      manifest.json                   makes it a checkpoint; written last

A fragment is elements [start, stop) of a flattened parameter: of its fp32 master, of one kind of optimizer state, of a
frozen parameter or a buffer. <save> is different for every save, so that a save never overwrites what an earlier
manifest lists. While a save is under way there is also a `rank-*.json` for each file, the part that its rank reports to
rank 0. Everything is JSON or safetensors: nothing is unpickled.

manifest.json: {
    format, sha256 (of the canonical JSON of the rest), step, save, world_size, zero_stage, versions,
    files:      [{name, size, block_bytes, blocks: [xxh3 of each block]}],
    parameters: {name: {shape, dtype (of compute), frozen}},  buffers: {name: {shape, dtype}},
    aliases:    {name: [other names of the same tied parameter]},
    ranges:     {name: [[index of file, start, stop], ...]}   # sorted; together every element exactly once
    scalars:    {optimizer, kinds, optimizer_scalars, loss_scaler; where there are: other_kinds ({name: kinds}),
                ema ({num_updates}), exact ({name: exponent})},
    data:       position in the data (examples_seen, fingerprint, exceptions),
    evaluation: {metric: value} of an evaluation after this step; where there was one
    early_stopping: {metric, best, best_step, waited}; where the run may end early
    run, attempt, config, ...                                 # what the run adds
}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from configs.errors import Damaged, NotFound, ShardyardError
from data_pipelines.storage import Store
from trainer.manifest import manifest_misfit
from trainer.tensor_files import TensorFile, write_tensors

MANIFEST = "manifest.json"
FORMAT = "shardyard-checkpoint-1"

_FILE = re.compile(r"rank-\d{5,}-([0-9a-f]+-\d{6})\.(?:safetensors|json)")

Ranges = dict[str, list[list[int]]]


def file_name(rank: int, save: str) -> str:
    """A rank's tensors."""
    return f"rank-{rank:05d}-{save}.safetensors"


def part_name(rank: int, save: str) -> str:
    """What a rank reports when its tensors are durable, or when it failed."""
    return f"rank-{rank:05d}-{save}.json"


def save_id(attempt: str, count: int) -> str:
    """What names one save. attempt: hexadecimal, different for every attempt; count: of saves in it."""
    return f"{attempt}-{count:06d}"


def is_later_save(name: str, save: str) -> bool:
    """Whether a file belongs to a save that the same attempt began after `save`."""
    match = _FILE.fullmatch(name)
    return match is not None and match[1].startswith(save.partition("-")[0] + "-") and match[1] > save


def tensor_key(kind: str, name: str, start: int) -> str:
    """A fragment's name in its file."""
    return f"{kind}/{name}/{start}"


# --- writing


def write_part(store: Store, rank: int, save: str, tensors: Mapping[str, Tensor], ranges: Ranges) -> None:
    """Write a rank's fragments, and then its part: whoever sees the part knows that the tensors are durable.

    tensors: by tensor_key. ranges: {name: [[start, stop], ...]} of what they hold.
    """
    entry = write_tensors(store, file_name(rank, save), tensors)
    store.write_atomic(part_name(rank, save), json.dumps({"file": entry, "ranges": ranges}))


def write_failure(store: Store, rank: int, save: str, error: str) -> None:
    """Report that a rank could not write its fragments."""
    store.write_atomic(part_name(rank, save), json.dumps({"error": error}))


def write_manifest(store: Store, header: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the ranks' parts (in the order of ranks) to a manifest and write it; with that the checkpoint exists.

    header: all other fields. Returns the manifest.

    Raises:
        ShardyardError: the parts do not hold every element exactly once.
    """
    files, ranges = [], dict[str, list[list[int]]]()
    for index, part in enumerate(parts):
        files.append(part["file"])
        for name, own in part["ranges"].items():
            ranges.setdefault(name, []).extend([index, start, stop] for start, stop in own)
    for name, entry in (header["parameters"] | header["buffers"]).items():
        ranges[name] = _sorted_cover(name, ranges.get(name, []), math.prod(entry["shape"]))
    manifest = {"format": FORMAT, **header, "files": files, "ranges": ranges}
    manifest["sha256"] = _digest(manifest)
    store.write_atomic(MANIFEST, _canonical(manifest))
    return manifest


def _sorted_cover(name: str, ranges: list[list[int]], numel: int) -> list[list[int]]:
    ranges = sorted((item for item in ranges if item[2] > item[1]), key=lambda item: item[1])
    end = 0
    for _, start, stop in ranges:
        if start != end:
            raise ShardyardError(f"The ranks' parts of '{name}' do not join: {ranges} of {numel} elements.")
        end = stop
    if end != numel:
        raise ShardyardError(f"The ranks hold {end:,} of the {numel:,} elements of '{name}'.")
    return ranges


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


def read_manifest(store: Store) -> dict[str, Any]:
    """The manifest of the checkpoint in this folder.

    Raises:
        NotFound: there is none, so this is no checkpoint (or one whose save was cut off).
        Damaged: it is not what was written. ShardyardError: it is in another version's format.
    """
    path = store.path(MANIFEST)
    try:
        manifest = json.loads(store.read_bytes(MANIFEST))
        good = manifest["sha256"] == _digest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is not readable ({type(error).__name__}). Use another checkpoint.") from error
    if not good:
        raise Damaged(f"{path} fails its own sha256. Use another checkpoint.")
    if manifest.get("format") != FORMAT:
        raise ShardyardError(
            f"{path} has the format {manifest.get('format')!r}; this version reads {FORMAT!r}. "
            "Read it with the version of shardyard that wrote it."
        )
    if (misfit := manifest_misfit(manifest)) is not None:
        raise Damaged(f"{path} is no manifest: {misfit}. Use another checkpoint.")
    return manifest


# --- reading


class CheckpointReader:
    """A checkpoint folder open for reading, with neither DeepSpeed nor a process group.

    Opening verifies the manifest alone. Files are opened, and blocks verified, when they are first needed, so that a
    rank reads what it asks for and no more.

    Raises:
        NotFound: no checkpoint is there. Damaged: from here or from any method; names the file, and the block.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest: dict[str, Any] = read_manifest(store)
        self._files: dict[int, TensorFile] = {}

    @property
    def name(self) -> str:
        """The folder's name, such as step-00000500."""
        return self.store.path().rstrip("/").rpartition("/")[2]

    @property
    def size_bytes(self) -> int:
        """Of all tensor files."""
        return sum(entry["size"] for entry in self.manifest["files"])

    @property
    def bytes_read(self) -> int:
        """Of the tensor files so far: of whole blocks, each counted once."""
        return sum(file.bytes_read for file in self._files.values())

    def verify(self, *, contents: bool = True) -> list[str]:
        """One message for each piece of damage. contents: read every byte, not only the files' sizes."""
        messages = []
        for index, entry in enumerate(self.manifest["files"]):
            try:
                if contents:
                    messages += TensorFile(self.store, entry).verify()
                elif self.store.size(entry["name"]) != entry["size"]:
                    messages.append(f"{self.store.path(entry['name'])} has not its {entry['size']:,} bytes.")
            except (Damaged, NotFound) as error:
                messages.append(f"{error} It holds the part of rank {index}.")
        return messages

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter or buffer: "master", the optimizer's kinds, "ema"; or "frozen"; or "buffer"."""
        if name in self.manifest["buffers"]:
            return ["buffer"]
        if self.manifest["parameters"][name]["frozen"]:
            return ["frozen"]
        scalars = self.manifest["scalars"]
        optimizers = scalars.get("other_kinds", {}).get(name, scalars["kinds"])
        return ["master", *optimizers, *(["ema"] if "ema" in scalars else [])]

    def weights_kind(self, name: str) -> str:
        """The kind that is used outside the run: the average of the weights where there is one."""
        kinds = self.kinds(name)
        return "ema" if "ema" in kinds else kinds[0]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter or buffer, in the dtype stored; 1-D, in memory of its own."""
        if start == stop:
            return torch.empty(0)
        ranges = self.manifest["ranges"][name]
        pieces = []
        for index, low, high in ranges[bisect_right(ranges, start, key=lambda item: item[1]) - 1 :]:
            if low >= stop:
                break
            key = tensor_key(kind, name, low)
            pieces.append(self._file(index, key).read(key, max(start - low, 0), min(stop, high) - low))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _file(self, index: int, key: str) -> TensorFile:
        if index not in self._files:
            self._files[index] = TensorFile(self.store, self.manifest["files"][index])
        if key not in self._files[index]:
            raise Damaged(f"{self.store.path(self.manifest['files'][index]['name'])} lacks the fragment '{key}'.")
        return self._files[index]

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of a parameter or buffer."""
        return tuple((self.manifest["parameters"] | self.manifest["buffers"])[name]["shape"])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the module's whole state_dict; trained parameters in fp32, tied ones by each name.

        The average of the weights where there is one.
        """
        for name in [*self.manifest["parameters"], *self.manifest["buffers"]]:
            shape = self.shape(name)
            tensor = self.read(name, self.weights_kind(name), 0, math.prod(shape)).view(shape)
            yield name, tensor
            for alias in self.manifest["aliases"].get(name, []):
                yield alias, tensor
