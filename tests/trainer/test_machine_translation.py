from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UsageError
from configs.load import load
from data_pipelines.tokenizer import EOS_ID, TokenizerConfig, train_tokenizer
from tests.contract.examples import built
from tests.trainer.attempts import train
from tests.trainer.test_recipes_run import shrunk
from trainer.bound import BoundModel, BoundTask
from trainer.example_batch import batch_of
from trainer.inference import load_model
from trainer.models import seq2seq
from trainer.parts.cross_entropy import summed_cross_entropy
from trainer.pictures import heat_map
from trainer.tasks import machine_translation as task

SEQ_LEN = 8
TOKENIZER = TokenizerConfig(name="bytes")


def bound(**settings: Any) -> BoundTask:
    return BoundTask(task, task.Config(seq_len=SEQ_LEN, tokenizer=TOKENIZER, **settings))


def model(**settings: Any) -> torch.nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "hidden_size": 32, "num_heads": 2} | settings
    return built(BoundModel(seq2seq, seq2seq.Config(**sizes), *bound().io())).eval()


def row(source: list[int], target: list[int]) -> dict[str, np.ndarray]:
    return {"source": np.array([EOS_ID, *source], np.uint16), "target": np.array([EOS_ID, *target], np.uint16)}


def test_each_id_and_the_end_is_predicted_from_those_before_it() -> None:
    batch = batch_of(bound(), [row([5, 6], [7, 8, 9]), row([5], [4])])
    assert batch["target"].tolist() == [[EOS_ID, 7, 8, 9, EOS_ID], [EOS_ID, 4, EOS_ID, EOS_ID, EOS_ID]]
    assert task._labels(batch).tolist() == [[7, 8, 9, EOS_ID], [4, EOS_ID, -100, -100]]
    assert bound().num_items(batch) == 6 and bound().num_tokens(batch) == 3 + 2 + 6
    network = model()
    with torch.no_grad():
        logits = network(torch.tensor([[EOS_ID, 5, 6]]), torch.tensor([3]), torch.tensor([[EOS_ID, 7, 8, 9]]))
        expected = summed_cross_entropy(logits[0], torch.tensor([7, 8, 9, EOS_ID]), 0.2)
        found = bound(label_smoothing=0.2).loss(network, batch_of(bound(), [row([5, 6], [7, 8, 9])]))
        sums = bound(label_smoothing=0.2).evaluate(network, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert sums["nll_nats"] == pytest.approx(bound().loss(network, batch).item(), rel=1e-5), "it is not smoothed"


def test_what_is_too_long_is_cut_but_not_the_reference() -> None:
    long = list(range(1, 21))
    training, evaluation = (batch_of(bound(), [row(long, long)], training=training) for training in (True, False))
    assert training["source"].tolist() == [[EOS_ID, *long[:7]]]
    assert training["target"].tolist() == [[EOS_ID, *long[:8]]], "no end is learned where the text goes on"
    assert "reference" not in training
    assert evaluation["reference"].tolist() == [[EOS_ID, *long]]


def test_a_share_of_the_texts_is_copied_in_training() -> None:
    pair = row([1, 2], [3, 4, 5])
    sources = {}
    for training in (True, False):
        prepare = bound(copied_share=0.25).preparation([], training=training)
        assert prepare is not None
        rng = np.random.default_rng(0)
        prepared = [prepare(pair, rng) for _ in range(400)]
        sources[training] = sum(each["source"].tolist() == pair["target"].tolist() for each in prepared)
        assert all(each["target"].tolist() == [*pair["target"], EOS_ID] for each in prepared)
    assert 70 < sources[True] < 130 and not sources[False]


def test_predictions_are_texts_and_their_references() -> None:
    tokenizer = train_tokenizer(TOKENIZER, [])
    texts = [("ab", "naïve text"), ("c", "x")]
    ids = [[tokenizer.encode([text])[0].tolist() for text in pair] for pair in texts]
    batch = batch_of(bound(), [row(*pair) for pair in ids], training=False)
    found = bound(beam_size=2).predict(model(), batch, tokenizer)
    assert [each["reference"] for each in found] == ["naïve text", "x"]
    assert all(isinstance(each["translation"], str) for each in found)


def test_a_model_that_has_learned_its_pairs_translates_them() -> None:
    torch.manual_seed(0)
    network = model().train()
    tokenizer = train_tokenizer(TOKENIZER, [])
    pairs = [("one", "un"), ("two", "deux"), ("six", "six"), ("ten", "dix")]
    rows = [row(*(tokenizer.encode([text])[0].tolist() for text in pair)) for pair in pairs]
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        bound(label_smoothing=0.1).loss(network, batch_of(bound(), rows)).backward()
        optimizer.step()
    batch = batch_of(bound(), rows, training=False)
    for beams in (1, 3):
        found = bound(beam_size=beams).predict(network.eval(), batch, tokenizer)
        assert [each["translation"] for each in found] == [target for _, target in pairs]
    assert bound().scores(found)["chrf"] == pytest.approx(100)
    with torch.no_grad():
        (picture,) = bound().pictures(network, batch, tokenizer, 0).values()
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert picture.std() > 1


def test_scores_are_those_of_the_whole_corpus() -> None:
    """BLEU by its definition (Papineni et al. 2002): clipped matches of 1 to 4 words over all texts."""
    said = ["the cat sat on the mat", "a dog ran far away today"]
    so = ["the cat is on the mat", "a dog ran far away now and then"]
    rows = [{"translation": one, "reference": other} for one, other in zip(said, so, strict=True)]
    precisions = []
    for size in range(1, 5):
        hits = total = 0
        for one, other in zip(said, so, strict=True):
            grams, others = (
                [tuple(text.split()[at:][:size]) for at in range(len(text.split()) - size + 1)] for text in (one, other)
            )
            hits += sum(min(grams.count(gram), others.count(gram)) for gram in set(grams))
            total += len(grams)
        precisions.append(hits / total)
    brevity = np.exp(1 - 14 / 12)
    expected = 100 * brevity * np.exp(np.mean(np.log(precisions)))
    found = bound().scores(rows)
    assert found["bleu"] == pytest.approx(expected, rel=1e-6)
    assert 0 < found["chrf"] < 100
    assert bound().scores([]) == {}


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r'pip install "shardyard\[metrics\]"'):
        bound().scores([{"translation": "a", "reference": "b"}])


def test_its_checkpoints_continue_no_text() -> None:
    config = load("machine_translation-seq2seq-small").config.model_dump(mode="json")
    reader: Any = SimpleNamespace(manifest={"config": config}, name="step-00000001")
    with pytest.raises(UsageError, match="step-00000001 is of the task 'machine_translation'; only language models"):
        load_model(reader)


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(UsageError, match="token id 300"):
        bound().check(batch_of(bound(), [row([300], [1])]))


@pytest.mark.distributed
def test_weights_cut_over_ranks_translate_as_whole_ones(tmp_path: Path) -> None:
    """At ZeRO-3 a rank that ended its translations sooner would leave the others waiting."""
    found = []
    for stage in (1, 3):
        config = shrunk("machine_translation-seq2seq-small", tmp_path / str(stage)) | {"zero": {"stage": stage}}
        config["task"]["seq_len"] = config["data"]["task"]["seq_len"] = 12
        config["optimizer"]["name"] = "adamw"  # muon takes whole matrices alone
        config["model"]["copies"] = True
        record = train(config, world_size=2)
        found.append({key: value for key, value in record.stitched()[-1].items() if key.startswith("validation/")})
        assert [path.name for path in (tmp_path / str(stage)).rglob("*.png")]
        del found[-1]["validation/seconds"]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert {"validation/bleu", "validation/chrf", "validation/perplexity"} <= found[0].keys()


def test_a_heat_map_has_a_square_for_each_value_below_and_beside_the_names() -> None:
    values = np.array([[0.0, 1.0, 0.5], [0.25, 0.0, 0.0]])
    picture = heat_map(values, ["ñandú", "b"], ["one", "two", "日"], cell=10)
    squares = picture[-20:, -30:].reshape(2, 10, 3, 10, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    brightness = squares[:, 0, :, 0].astype(int).sum(-1)
    assert brightness[0, 1] < brightness[0, 2] < brightness[1, 0] < brightness[0, 0] == brightness[1, 2] == 3 * 255
    beside, above = picture[-20:, :-30], picture[:-20, -30:]
    assert (beside < 128).any() and (above < 128).any()
    assert np.array_equal(beside, heat_map(values, ["nandu", "b"], ["x", "y", "z"], cell=10)[-20:, :-30])
