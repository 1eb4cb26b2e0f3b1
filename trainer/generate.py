"""Sampling from a language model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.errors import UsageError

if TYPE_CHECKING:
    from data_pipelines.tokenizer import Tokenizer


def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
    eos_id: int,
) -> Iterator[int]:
    """Ids that continue the prompt, until `max_tokens` or the end of the document (`eos_id`, not given).

    model: maps tokens (1, T) to logits (1, T, V), and has `seq_len`, the most positions it takes; of a longer text it
        sees the last `seq_len` tokens. If it has `new_cache` (trainer/shapes.py), each token is computed once.
    prompt_ids: what comes before, beginning with `eos_id`, which begins a document; empty stands for `eos_id` alone.
    temperature: divides the logits; 0 takes the likeliest token. top_k, top_p: see `probabilities`.

    The same seed gives the same tokens. Raises UsageError for settings out of range.
    """
    for name, value, allowed, rule in (
        ("max_tokens", max_tokens, max_tokens >= 0, "at least 0"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not allowed:
            raise UsageError(f"{name}={value}: it must be {rule}.")
    context = [int(number) for number in prompt_ids] or [eos_id]
    generator = torch.Generator().manual_seed(seed)
    return _generate(model, context, max_tokens, temperature, top_k, top_p, generator, eos_id)


def _generate(
    model: nn.Module,
    context: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    eos_id: int,
) -> Iterator[int]:
    new_cache = getattr(model, "new_cache", None)
    cache = None if new_cache is None else new_cache()
    for _ in range(max_tokens):
        # On the CPU, in fp32: every rank of a sharded model must draw the same token.
        logits = _next_logits(model, context, cache).float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(probabilities(logits / temperature, top_k, top_p), 1, generator=generator))
        if token == eos_id:
            return
        context.append(token)
        yield token


def _next_logits(model: Any, context: list[int], cache: Any) -> Tensor:
    """Logits (V,) of the token after `context`, from a model that is in evaluation mode meanwhile.

    The cache holds what was computed of the context before. It is of no use once the context is longer than the model
    takes: what the last tokens are to it depends on those that it does not see any more.
    """
    uses_cache = cache is not None and len(context) <= model.seq_len
    new = context[cache.length :] if uses_cache else context[-model.seq_len :]
    tokens = torch.tensor([new], device=next(model.parameters()).device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return (model(tokens, cache=cache) if uses_cache else model(tokens))[0, -1]
    finally:
        model.train(was_training)


def probabilities(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """softmax of logits (V,), with all but the likeliest tokens set to zero.

    top_k: keep the k likeliest (Fan et al. 2018). top_p: keep the likeliest that together reach p, at least one
    (nucleus sampling, Holtzman et al. 2019). None keeps all.
    """
    values, order = logits.sort(descending=True, stable=True)
    kept = values.softmax(0)
    if top_k is not None:
        kept[top_k:] = 0
    if top_p is not None:
        before = kept.cumsum(0) - kept
        kept[before >= top_p * kept.sum()] = 0
    return torch.zeros_like(kept).scatter_(0, order, kept / kept.sum())


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
) -> Iterator[str]:
    """The text that continues `prompt`, in pieces as they come; a piece ends between characters."""
    ids = generate(
        model,
        [tokenizer.eos_id, *tokenizer.encode([prompt])[0].tolist()],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    return _decoded(tokenizer, ids)


def distinct(text: str, size: int) -> float:
    """How little a text repeats itself: different phrases of `size` words, over all its words (Li et al. 2016).

    0 for a text without words.
    """
    words = text.split()
    return len(set(zip(*(words[start:] for start in range(size)), strict=False))) / max(len(words), 1)


def _decoded(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        piece = tokenizer.decode(pending)
        if not piece.endswith("\ufffd"):  # the first bytes of a character whose others are in the next tokens
            yield piece
            pending = []
    if pending:
        yield tokenizer.decode(pending)
