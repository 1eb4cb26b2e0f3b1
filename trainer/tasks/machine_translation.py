"""Machine translation: write in one language what is read in another.

A stored row has `source` and `target`: the ids of both texts, each led by the end mark, from one tokenizer that was
trained on both (a build makes them of a source's texts `source` and `target`). A text longer than `seq_len` ids is cut.

A batch, B = examples, S and T the longest of it: source (B, S), target (B, T), ids of any integer type; source_length
and target_length (B,). A target has the end mark at both ends: all but its last id are read, and all but its first
predicted. In evaluation reference (B, R) and reference_length (B,) are the whole target, which nothing cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import Section
from data_pipelines.tokenizer import EOS_ID, Tokenizer, TokenizerConfig
from trainer.parts.beam_search import beam_search
from trainer.parts.cross_entropy import IGNORED, summed_cross_entropy
from trainer.pictures import heat_map
from trainer.shapes import Logits, TokenPair

if TYPE_CHECKING:
    from data_pipelines.columns import Column
    from trainer.run_data import Totals

PAD = EOS_ID
RAGGED = {"source": 1, "target": 1, "reference": 1}
_SHOWN_TOKENS = 40  # of a source whose translation is drawn, at most


class Config(Section):
    """How long texts may be, what a token is, and how one is translated."""

    seq_len: int = Field(ge=2, description="Most tokens that are read, and that are written.", examples=[128])
    tokenizer: TokenizerConfig = Field(
        default=TokenizerConfig(), description="How text becomes tokens; both languages share it."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label's probability that is spread over all ids, in training."
    )
    copied_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of examples, in training, that read the text they shall write instead of its source.",
    )
    beam_size: int = Field(default=1, ge=1, description="Beginnings kept while translating; 1 is greedy.")


def columns(config: Config) -> tuple[str, ...]:  # noqa: ARG001 - the signature of every task
    """What it reads of a stored row."""
    return ("source", "target")


def example(config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two texts of random ids."""
    row = {}
    for name in ("source", "target"):
        ids = rng.integers(1, config.tokenizer.vocab_size, int(rng.integers(2, config.seq_len + 2))).astype(np.uint16)
        ids[0] = EOS_ID
        row[name] = ids
    return row


def packing(config: Config) -> None:  # noqa: ARG001
    """Examples are rows."""
    return


def length_column(config: Config) -> str:  # noqa: ARG001
    """Rows of like length share micro-batches."""
    return "target"


def io(config: Config) -> tuple[TokenPair, Logits]:
    """Two sequences in, one logit for each id out."""
    vocab_size = config.tokenizer.vocab_size
    return TokenPair(vocab_size, config.seq_len), Logits(vocab_size)


def preparation(
    config: Config,
    stored: Sequence[Column],  # noqa: ARG001
    *,
    training: bool,
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """The target ended, both cut to what the model takes; beside them, where it is evaluated, the whole target.

    In training copied_share of the sources are their targets (Currey et al. 2017): where to look is learned sooner, and
    the language that is written from more.
    """
    copied_share = config.copied_share if training else 0.0

    def prepare(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, target = np.asarray(row["source"]), np.asarray(row["target"])
        if copied_share and rng.random() < copied_share:
            source = target
        ended = np.append(target, target.dtype.type(EOS_ID))
        prepared = {"source": source[: config.seq_len], "target": ended[: config.seq_len + 1]}
        return prepared if training else prepared | {"reference": target}

    return prepare


def check(batch: Mapping[str, Tensor], config: Config) -> None:
    """Raises UsageError for an id that is none of the tokenizer's."""
    greatest = max(int(batch[name].to(torch.int64).max()) for name in ("source", "target"))
    if greatest >= config.tokenizer.vocab_size:
        raise UsageError(
            f"The data has the token id {greatest}, but task.tokenizer.vocab_size={config.tokenizer.vocab_size}. "
            "Set it to the size of the tokenizer that the data was made with."
        )


def num_items(batch: Mapping[str, Tensor]) -> int:
    """Ids to predict, ends counted."""
    return int((batch["target_length"] - 1).clamp(min=0).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    """Ids that are read and written; padding is left out."""
    return int(batch["source_length"].sum()) + num_items(batch)


def idle(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with nothing to predict: its loss is zero, and so is every gradient."""
    return {**batch, "target_length": torch.zeros_like(batch["target_length"])}


def loss(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> Tensor:
    """Sum of the smoothed cross-entropy in nats over the ids to predict: an fp32 scalar."""
    labels = _labels(batch)
    return summed_cross_entropy(_logits(model, batch).flatten(0, 1), labels.flatten(), config.label_smoothing)


def evaluate(model: nn.Module, batch: Mapping[str, Tensor], config: Config) -> dict[str, float]:  # noqa: ARG001
    """Sums over the ids to predict: nll_nats (not smoothed), tokens, and correct (those that were the likeliest)."""
    labels, logits = _labels(batch), _logits(model, batch)
    correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
    return {
        "nll_nats": float(summed_cross_entropy(logits.flatten(0, 1), labels.flatten())),
        "tokens": float(num_items(batch)),
        "correct": float(correct.sum()),
    }


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T - 1): the id that follows each, or -100 where none counts."""
    labels = batch["target"][:, 1:].to(torch.int64)
    places = torch.arange(labels.shape[1], device=labels.device)
    return labels.masked_fill(places >= batch["target_length"].unsqueeze(1) - 1, IGNORED)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T - 1, V)."""
    return model(batch["source"].to(torch.int64), batch["source_length"], batch["target"][:, :-1].to(torch.int64))


def metrics(sums: Mapping[str, float], config: Config, split: Totals) -> dict[str, float]:  # noqa: ARG001
    """loss (nats a token), perplexity and accuracy of each token given those before; nothing where none counted."""
    if not sums.get("tokens"):
        return {}
    nats = sums["nll_nats"] / sums["tokens"]
    accuracy = sums["correct"] / sums["tokens"]
    return {"loss": nats, "perplexity": math.exp(min(nats, 700.0)), "accuracy": accuracy}  # a float ends at e^709


def predict(
    model: nn.Module, batch: Mapping[str, Tensor], config: Config, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The translation and the reference of each example, as text."""
    source = batch["source"].to(torch.int64)
    written = beam_search(model, source, batch["source_length"], beam_size=config.beam_size, eos_id=EOS_ID)
    references = zip(batch["reference"].tolist(), batch["reference_length"].tolist(), strict=True)
    return [
        {"translation": tokenizer.decode(ids), "reference": tokenizer.decode(reference[:length])}
        for ids, (reference, length) in zip(written, references, strict=True)
    ]


def scores(predictions: Sequence[Mapping[str, Any]], config: Config) -> dict[str, float]:  # noqa: ARG001
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) over all of them, 0 to 100, as sacrebleu has them by default.

    Raises UsageError where sacrebleu is not installed.
    """
    if not predictions:
        return {}
    translations = [str(each["translation"]) for each in predictions]
    references = [str(each["reference"]) for each in predictions]
    return translation_scores(translations, references)


def translation_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """bleu and chrf of a whole corpus, one reference for each translation."""
    try:
        import sacrebleu
    except ImportError as error:
        raise UsageError(
            'BLEU and chrF are computed by sacrebleu, which is not installed. pip install "shardyard[metrics]"'
        ) from error
    return {
        "bleu": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
    }


def pictures(
    model: Any,
    batch: Mapping[str, Tensor],
    config: Config,
    tokenizer: Tokenizer,
    seed: int,  # noqa: ARG001
) -> dict[str, np.ndarray]:
    """What the model looks at while it translates one text: the mean over its attentions to the source.

    A row for each id written, a column for each read; the longest source of the batch that has at most 40 ids is
    taken, or the beginning of the first.
    """
    lengths = batch["source_length"].clamp(max=_SHOWN_TOKENS)
    chosen = int((batch["source_length"] * (batch["source_length"] <= _SHOWN_TOKENS)).argmax())
    length = lengths[chosen : chosen + 1]
    source = batch["source"][chosen : chosen + 1, : int(length)].to(torch.int64)
    (written,) = beam_search(model, source, length, beam_size=config.beam_size, eos_id=EOS_ID)
    target = torch.tensor([[EOS_ID, *written]], device=source.device)[:, : config.seq_len]
    cache: Any = model.new_cache(keeps_weights=True)
    model(source, length, target, cache=cache)
    weights = torch.stack([layer.weights for layer in cache.layers]).float().mean((0, 2))[0]  # (T, S)
    read = ["|", *(tokenizer.decode([number]) for number in source[0, 1:].tolist())]
    said = [*(tokenizer.decode([number]) for number in written), "|"][: len(weights)]
    return {"attention": heat_map(weights.cpu().numpy(), said, read)}
