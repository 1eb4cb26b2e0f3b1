from __future__ import annotations

import copy
import json
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.errors import Damaged, NotFound, ShardyardError
from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.data_pipelines.conftest import BYTES, sample_texts


def folder(dataset: Dataset) -> Path:
    path = dataset.store.local_path()
    assert path is not None
    return path


def texts(dataset: Dataset) -> dict[str, str]:
    return {
        key: dataset.tokenizer.decode(tokens) for split in dataset.splits for key, tokens, _ in dataset.documents(split)
    }


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def test_what_was_written_is_read(dataset: Dataset) -> None:
    assert sorted(texts(dataset).values()) == sorted(sample_texts())
    for split in dataset.splits:
        for key, tokens, num_bytes in dataset.documents(split):
            assert num_bytes == len(tokens) == len(texts(dataset)[key].encode())
    assert len(dataset.blocks("train")) > 4 and len({block.file for block in dataset.blocks("train")}) > 1
    assert dataset.verify() == []


def test_each_block_is_the_message_its_index_says(dataset: Dataset) -> None:
    for split in dataset.splits:
        first_row = 0
        for name in {block.file: None for block in dataset.blocks(split)}:
            reader = pa.ipc.open_file(folder(dataset) / name)
            blocks = [block for block in dataset.blocks(split) if block.file == name]
            assert [block.number for block in blocks] == list(range(reader.num_record_batches))
            for block in blocks:
                batch = reader.get_batch(block.number)
                assert (block.first_row, block.rows) == (first_row, batch.num_rows)
                assert block.text_bytes == sum(batch.column("num_bytes").to_pylist())
                assert dataset.read(block).tokens.tolist() == batch.column("tokens").values.to_pylist()
                first_row += block.rows


def test_reads_are_views_of_the_mapped_file(dataset: Dataset) -> None:
    block = dataset.blocks("train")[0]
    data = dataset.read(block)
    mapped = dataset._files[block.file]
    for array in (data.tokens, data.offsets, data.num_bytes):
        assert mapped.address + block.start <= array.ctypes.data < mapped.address + block.stop
        assert not array.flags.owndata and not array.flags.writeable
    assert dataset.read(block) is data


def test_opening_reads_no_arrow_file(dataset: Dataset) -> None:
    for file in folder(dataset).glob("*.arrow"):
        file.unlink()
    opened = Dataset.open(folder(dataset))
    assert (opened.fingerprint, opened.splits) == (dataset.fingerprint, ("train", "validation"))
    assert len(opened.packed("train", 16)) == len(dataset.packed("train", 16))
    assert copy.deepcopy(opened).fingerprint == dataset.fingerprint


def test_a_damaged_block_is_named_when_it_is_used_and_no_other_suffers(dataset: Dataset) -> None:
    block = dataset.blocks("train")[3]
    flip(folder(dataset) / block.file, block.stop - 20)
    opened = Dataset.open(folder(dataset))
    with pytest.raises(Damaged) as error:
        list(opened.documents("train"))
    last = block.first_row + block.rows - 1
    for words in (block.file, f"block {block.number} ", f"documents {block.first_row} to {last}", "Delete that folder"):
        assert words in str(error.value)
    assert [(damage.file, damage.block) for damage in opened.verify()] == [(block.file, block.number)]
    assert opened.read(opened.blocks("train")[2]).tokens.size


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_byte_of_a_block_is_found(dataset: Dataset, seed: int) -> None:
    block = random.Random(seed).choice(dataset.blocks("train"))
    flip(folder(dataset) / block.file, random.Random(seed).randrange(block.start, block.stop))
    assert [(damage.file, damage.block) for damage in Dataset.open(folder(dataset)).verify()] == [
        (block.file, block.number)
    ]


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_truncated_file_is_named(dataset: Dataset, keep: float) -> None:
    block = dataset.blocks("train")[-1]
    file = folder(dataset) / block.file
    file.write_bytes(file.read_bytes()[: int(keep * block.stop)])
    opened = Dataset.open(folder(dataset))
    with pytest.raises(Damaged, match=rf"{block.file} is truncated: block {block.number} .*Delete that folder"):
        opened.read(block)
    assert {damage.file for damage in opened.verify()} == {block.file}
    assert "bytes long instead of" in str(opened.verify()[0])


def test_a_missing_file_is_named(dataset: Dataset) -> None:
    (folder(dataset) / "validation-00000.arrow").unlink()
    opened = Dataset.open(folder(dataset))
    with pytest.raises(Damaged, match=r"validation-00000.arrow is missing.*Delete that folder"):
        list(opened.documents("validation"))
    assert str(opened.verify()[0]) == "validation-00000.arrow: missing"


def test_a_missing_index_and_an_unknown_split(dataset: Dataset) -> None:
    with pytest.raises(NotFound, match="no split 'test'; it has train, validation"):
        dataset.packed("test", 8)
    (folder(dataset) / "index.json").unlink()
    with pytest.raises(NotFound, match=r"no data set in .*index\.json.*Build the data set again"):
        Dataset.open(folder(dataset))


def test_a_damaged_tokenizer_is_named(dataset: Dataset) -> None:
    flip(folder(dataset) / "tokenizer.json", 40)
    opened = Dataset.open(folder(dataset))
    with pytest.raises(Damaged, match=r"tokenizer\.json fails its digest"):
        _ = opened.tokenizer
    assert [damage.file for damage in opened.verify()] == ["tokenizer.json"]


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_index_is_an_error_for_people(dataset: Dataset, seed: int) -> None:
    file = folder(dataset) / "index.json"
    raw = bytearray(file.read_bytes())
    generator = random.Random(seed)
    if seed % 3 == 0:
        raw = raw[: generator.randrange(len(raw))]
    elif seed % 3 == 1:
        raw[generator.randrange(len(raw))] = generator.randrange(33, 127)
    else:
        content = json.loads(raw)
        content.pop(generator.choice(sorted(content)))
        raw = bytearray(json.dumps(content).encode())
    if raw == file.read_bytes():
        return
    file.write_bytes(raw)
    with pytest.raises(ShardyardError, match=r"index\.json"):
        Dataset.open(folder(dataset))


def test_an_index_of_another_version_says_so(dataset: Dataset) -> None:
    file = folder(dataset) / "index.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(Damaged, match="format version 9"):
        Dataset.open(folder(dataset))


def test_a_remote_data_set_gives_the_same(
    remote: Store, source: Plugin, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.shards._MAX_REMOTE_BLOCKS", 2)
    far = ensure_dataset(remote, source, BYTES)
    assert far.fingerprint == dataset.fingerprint
    assert texts(far) == texts(dataset)
    assert len(far._blocks) <= 2
    assert far.verify() == []


def test_several_threads_may_read(dataset: Dataset) -> None:
    expected = [dataset.packed("train", 16)[number]["tokens"].tolist() for number in range(100)]
    opened = Dataset.open(folder(dataset))
    split = opened.packed("train", 16)
    found: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: found.append([split[number]["tokens"].tolist() for number in range(100)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_packing_a_data_set_holds_every_byte(dataset: Dataset) -> None:
    split = dataset.packed("train", 32)
    stream = np.concatenate([split[number]["tokens"][1 : 1 + split[number]["valid"]] for number in range(len(split))])
    expected = [[*tokens.tolist(), 0] for _, tokens, _ in dataset.documents("train")]
    assert stream.tolist() == [token for document in expected for token in document]
    assert split.num_bytes == sum(num_bytes for _, _, num_bytes in dataset.documents("train"))
