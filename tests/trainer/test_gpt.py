from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.models import SMALL, small_gpt
from tests.trainer.packed import EOS_ID, Packed, batch_of
from trainer.models import gpt
from trainer.parts.cross_entropy import summed_cross_entropy
from trainer.parts.recompute import Recompute, share_computed_again
from trainer.shapes import Logits, Tokens
from trainer.tasks import language_modeling

SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 1},
    {"num_kv_heads": 2, "tie_embeddings": False, "rope_theta": 500.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompt", [1, 5])
def test_with_a_cache_the_logits_are_those_of_the_whole_sequence(settings: dict[str, Any], prompt: int) -> None:
    model = small_gpt(**settings).eval()
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache()
    with torch.no_grad():
        found = [model(tokens[:, :prompt], cache=cache)]
        found += [model(tokens[:, place : place + 1], cache=cache) for place in range(prompt, 24)]
        torch.testing.assert_close(torch.cat(found, 1), model(tokens), atol=1e-4, rtol=1e-4)
    assert cache.length == 24


@pytest.mark.parametrize("settings", SETTINGS)
def test_packed_documents_give_the_logits_of_each_document_alone(settings: dict[str, Any]) -> None:
    model = small_gpt(**settings).eval()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (3, 1, 9, 0, 5, 2)]
    split = Packed(documents, seq_len=24)
    sequences = language_modeling.unpack(**batch_of(split, range(len(split))))
    with torch.no_grad():
        packed = model(sequences.tokens, sequences.document, sequences.position).flatten(0, 1)
    start = 0
    for document in documents:
        alone = torch.tensor([[EOS_ID, *document]])
        if start // 24 == (start + alone.shape[1] - 1) // 24:  # not cut by the end of a sequence
            with torch.no_grad():
                expected = model(alone)[0]
            torch.testing.assert_close(packed[start : start + alone.shape[1]], expected, atol=1e-5, rtol=1e-5)
        start += alone.shape[1]


def test_one_document_a_row_needs_no_mask() -> None:
    model = small_gpt().eval()
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(2))
    document = torch.zeros(2, 24, dtype=torch.int32)
    position = torch.arange(24, dtype=torch.int32).expand(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), model(tokens, document, position), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(changed=st.integers(0, 23), seed=st.integers(0, 5))
def test_a_token_changes_no_earlier_logits(changed: int, seed: int) -> None:
    model = small_gpt(seed=seed).eval()
    tokens = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens)[0], model(other)[0]
    assert torch.equal(before[:changed], after[:changed])
    assert ((before - after).abs().amax(-1) > 1e-6)[changed:].all()


def test_attention_depends_on_distances_between_positions_alone() -> None:
    model = small_gpt(seq_len=64, num_kv_heads=2).eval()
    tokens = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(3))
    position = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        here, shifted = model(tokens, None, position), model(tokens, None, position + 41)
        stretched = model(tokens, None, 2 * position)
    torch.testing.assert_close(here, shifted, atol=1e-4, rtol=1e-4)
    assert (here - stretched).abs().max() > 1e-2


def test_rotary_table_stays_exact_in_low_precision() -> None:
    rotary = gpt.Rotary(4096, 8, 10000.0)
    exact = torch.polar(torch.ones(1), torch.tensor([4000 * 10000 ** (-2 / 8)]))  # position 4000, pair 1
    for converted in (rotary, rotary.bfloat16(), rotary.half()):
        assert converted.table.dtype == torch.complex64
        torch.testing.assert_close(converted.table[4000, 1], exact[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(rotary.table.abs(), torch.ones(4096, 4))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("policy", [True, 2, "selective"])
def test_activation_checkpointing_changes_no_gradient(policy: Recompute, dropout: float) -> None:
    plain, recomputed = (
        small_gpt(num_layers=4, dropout=dropout, activation_checkpointing=each) for each in (False, policy)
    )
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(4))
    flops = []
    for model in (plain, recomputed):
        torch.manual_seed(5)  # of dropout
        loss = summed_cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    again = flops[1] - flops[0]
    forward = flops[0] / 2  # but for the head, which is not run again
    assert again == 0 if policy == "selective" else 0.5 < again / forward / share_computed_again(policy) < 1


def test_dropout_is_drawn_from_the_seed_and_off_in_evaluation() -> None:
    model, without = small_gpt(dropout=0.3), small_gpt()
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(6))

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(tokens)

    assert torch.equal(logits(0), logits(0))
    assert not torch.allclose(logits(0), logits(1), atol=1e-3)
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits(0), without(tokens))


def test_low_precision_follows_fp32() -> None:
    model = small_gpt(hidden_size=16, num_heads=2)
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(7))
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        exact = model(tokens, document)
        low = model.bfloat16()(tokens, document)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_mlp_size_follows_from_the_width() -> None:
    sizes = [gpt.Config(**(SMALL | {"hidden_size": width, "num_heads": 2})).mlp_size for width in (64, 256, 4096)]
    assert sizes == [192, 704, 10944]
    assert all(size % 64 == 0 and size >= 8 / 3 * width for size, width in zip(sizes, (64, 256, 4096), strict=True))
    assert gpt.Config(**SMALL, intermediate_size=77).mlp_size == 77


# Parameters of Llama 2 as published with its weights (Touvron et al. 2023: "7B", "70B").
LLAMA_7B = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "intermediate_size": 11008}
LLAMA_70B = {"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "intermediate_size": 28672}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192)],
)
def test_llama_sizes_are_counted_and_built_on_meta(settings: dict[str, Any], expected: int) -> None:
    config = gpt.Config(**settings, tie_embeddings=False)
    shapes = Tokens(32000, 4096), Logits(32000)
    assert gpt.num_parameters(config, *shapes) == expected
    with torch.device("meta"):
        module = gpt.build(config, *shapes)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_flops_of_a_large_model_are_near_six_a_parameter_and_token() -> None:
    config = gpt.Config(**LLAMA_70B, tie_embeddings=False)
    shapes = Tokens(32000, 512), Logits(32000)
    a_token = gpt.flops_per_example(config, *shapes) / 512
    assert a_token == pytest.approx(6 * gpt.num_parameters(config, *shapes), rel=0.02)


def test_initial_values() -> None:
    config = gpt.Config(num_layers=8, hidden_size=256, num_heads=4)
    matrix = torch.empty(256, 256)

    def std(name: str) -> float:
        gpt.init_parameter(config, name, matrix, torch.Generator().manual_seed(8))
        return float(matrix.std())

    wide = math.sqrt(2 / (5 * 256))
    assert std("blocks.3.attention.query.weight") == pytest.approx(wide, rel=0.02)
    assert std("embedding.weight") == pytest.approx(0.02, rel=0.02)
    for name in ("blocks.3.attention.output.weight", "blocks.0.mlp.down.weight"):
        assert std(name) == pytest.approx(wide / math.sqrt(16), rel=0.02)
    config = config.model_copy(update={"tie_embeddings": False})
    assert std("embedding.weight") == pytest.approx(0.5, rel=0.02)
    assert std("head.weight") == pytest.approx(0.02, rel=0.02)
    norm = torch.empty(256)
    for name in ("norm.weight", "blocks.1.attention_norm.weight", "blocks.1.mlp_norm.weight"):
        gpt.init_parameter(config, name, norm.zero_(), torch.Generator())
        assert torch.equal(norm, torch.ones(256))


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_model_knows_nothing_at_any_depth(tied: bool) -> None:
    tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(9))
    for depth in (1, 12):
        config = gpt.Config(num_layers=depth, hidden_size=64, num_heads=2, tie_embeddings=tied)
        model = gpt.build(config, Tokens(512, 64), Logits(512))
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                gpt.init_parameter(config, name, parameter, torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = summed_cross_entropy(logits, tokens[:, 1:].flatten()) / len(logits)
        assert float(loss) == pytest.approx(math.log(512), rel=0.02)


def test_a_small_model_learns_a_rule() -> None:
    torch.manual_seed(10)
    model = small_gpt(vocab_size=11, seq_len=12, hidden_size=32, num_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = torch.randint(0, 11, (16, 1))
    tokens = (start + 3 * torch.arange(13)) % 11  # each token is the one before it plus 3
    losses = []
    for _ in range(80):
        loss = summed_cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / (16 * 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"hidden_size": 30}, "multiple of 8"),
        ({"hidden_size": 36}, "multiple of 8"),  # heads of 9, which is odd
        ({"num_kv_heads": 3}, "divides num_heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_remedy(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        gpt.Config(**(SMALL | settings))


def test_parameters_grow_with_each_recipe_size() -> None:
    sizes = [
        gpt.num_parameters(gpt.Config(num_layers=layers, hidden_size=width, num_heads=heads), Tokens(v, 64), Logits(v))
        for layers, width, heads, v in (
            (2, 128, 2, 4096),
            (4, 256, 4, 4096),
            (12, 768, 12, 50304),
            (24, 2048, 16, 50304),
        )
    ]
    assert 0.5e6 < sizes[0] < 1.5e6 < sizes[-1]
    assert all(small < large for small, large in pairwise(sizes))
