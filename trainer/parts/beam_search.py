"""Writing a sequence for each of a batch of sources: the likeliest token after token, or the best of several beams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LENGTH_PENALTY = 0.6  # alpha of Wu et al. 2016, as Vaswani et al. 2017 set it


def beam_search(
    model: nn.Module, source: Tensor, source_length: Tensor, *, beam_size: int, eos_id: int
) -> list[list[int]]:
    """Ids that the model writes for each source, without the end mark.

    model: in evaluation mode, one that takes a TokenPair (trainer/shapes.py). source (B, S), source_length (B,).
    beam_size: K, how many beginnings are kept; 1 is greedy. Of K finished ones the best by log-probability over
    ((5 + length) / 6)^0.6 (Wu et al. 2016). None is longer than twice its source and ten ids, or `seq_len`: a model
    that has learned little repeats itself without end.

    Weights that are gathered from other ranks are gathered step by step: then all ranks go on to `seq_len`.
    """
    with torch.no_grad():
        return _search(model, source, source_length, beam_size, eos_id)


def _search(model: Any, source: Tensor, source_length: Tensor, beams: int, eos_id: int) -> list[list[int]]:
    examples, device = len(source), source.device
    is_whole = all(parameter.numel() for parameter in model.parameters())  # at ZeRO-3 they are empty between calls
    limit = (2 * source_length.to(torch.int64) + 10).clamp(max=model.seq_len)  # (B,), the end mark counted
    limit = limit.repeat_interleave(beams)  # (B K,), as everything below
    first_row = torch.arange(examples, device=device).repeat_interleave(beams) * beams
    rows = torch.arange(examples, device=device).repeat_interleave(beams)
    cache = model.new_cache()
    written = torch.full((examples, 1), eos_id, dtype=torch.int64, device=device)
    log_p = model(source, source_length, written, cache=cache)[:, -1].float().log_softmax(1)  # (B, V)
    cache.select(rows)
    source, source_length, written, log_p = source[rows], source_length[rows], written[rows], log_p[rows]
    total = torch.zeros(examples * beams, device=device)  # log-probability
    total[torch.arange(examples * beams, device=device) != first_row] = float("-inf")  # all begin alike: one counts
    length = torch.zeros_like(limit)
    finished = torch.zeros(examples * beams, dtype=torch.bool, device=device)
    for step in range(model.seq_len):
        if step:
            log_p = model(source, source_length, written[:, -1:], cache=cache)[:, -1].float().log_softmax(1)
        only_end = torch.full_like(log_p, float("-inf"))
        only_end[:, eos_id] = 0.0
        log_p = torch.where(finished.unsqueeze(1), only_end, log_p)
        log_p = torch.where((length + 1 >= limit).unsqueeze(1) & ~finished.unsqueeze(1), only_end, log_p)
        next_length = length + ~finished
        sums = total.unsqueeze(1) + log_p  # (B K, V)
        ranked = (sums / penalty(next_length).unsqueeze(1)).view(examples, -1).topk(beams, 1).indices  # (B, K)
        parent = (first_row.view(examples, beams) + ranked // log_p.shape[1]).flatten()
        token = (ranked % log_p.shape[1]).flatten()
        total, length = sums[parent, token], next_length[parent]
        finished = finished[parent] | (token == eos_id)
        written = torch.cat([written[parent], token.unsqueeze(1)], 1)
        if beams > 1:
            cache.select(parent)
        if is_whole and finished.all():
            break
    best = (total / penalty(length)).view(examples, beams).argmax(1)
    chosen = written[first_row[::beams] + best, 1:]
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in chosen.tolist()]


def penalty(length: Tensor) -> Tensor:
    """What the log-probability of a sequence of this length, its end mark counted, is divided by."""
    return ((5.0 + length) / 6.0) ** LENGTH_PENALTY
