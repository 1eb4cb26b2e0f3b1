"""The encoder-decoder against torch.nn.Transformer, and what it may not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.contract.examples import built
from trainer.bound import BoundModel
from trainer.initialization import materialize
from trainer.models import seq2seq
from trainer.parts.beam_search import beam_search, penalty
from trainer.shapes import Logits, TokenPair

VOCAB, SEQ_LEN, EOS = 30, 12, 0
SMALL = {"encoder_layers": 2, "decoder_layers": 2, "hidden_size": 16, "num_heads": 4}


def small(seed: int = 0, **settings: Any) -> seq2seq.Seq2Seq:
    """Norms that differ from 1, so that they matter."""
    config = seq2seq.Config(**(SMALL | settings))
    with torch.device("meta"):
        module = seq2seq.build(config, TokenPair(VOCAB, SEQ_LEN), Logits(VOCAB))

    def init(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(1.0, 0.3, generator=generator) if "norm" in name else tensor.normal_(
            0.0, 0.4, generator=generator
        )

    materialize(module, init, seed=seed)
    return module.eval()


def inputs(examples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(1, VOCAB, (examples, 9), generator=generator) for _ in range(2))
    return source, torch.tensor([9, 5, 1])[:examples], target


def plain(model: seq2seq.Seq2Seq, source: Tensor, length: Tensor, target: Tensor) -> Tensor:
    """The same by torch.nn.Transformer, with the sinusoids written out (Vaswani et al. 2017, 3.5)."""
    width = SMALL["hidden_size"]
    oracle = nn.Transformer(
        width,
        SMALL["num_heads"],
        SMALL["encoder_layers"],
        SMALL["decoder_layers"],
        4 * width,
        dropout=0.0,
        batch_first=True,
        norm_first=True,
        bias=False,
    ).eval()
    state = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("encoder_norm", "decoder_norm"):
            state[f"{part.removesuffix('_norm')}.norm.weight"] = value
        elif part in ("encoder", "decoder"):
            number, module, leaf = rest.split(".", 2)
            state[f"{part}.layers.{number}.{_counterpart(part, module, leaf)}"] = value
    for name in list(oracle.state_dict()):
        if name.endswith("in_proj_weight"):
            begin = name.removesuffix("in_proj_weight")
            state[name] = torch.cat([state.pop(f"{begin}{each}") for each in ("query", "key", "value")])
    oracle.load_state_dict(state)

    def embedded(ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], dtype=torch.float64).unsqueeze(1)
        pair = torch.arange(width) // 2
        angle = place / 10000 ** (2 * pair / width)
        waves = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()
        return model.embedding.weight[ids] * width**0.5 + waves

    padding = torch.arange(source.shape[1]) >= length.unsqueeze(1)
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    output = oracle(
        embedded(source),
        embedded(target),
        tgt_mask=causal,
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    return output @ model.embedding.weight.T


def _counterpart(part: str, module: str, leaf: str) -> str:
    """The name of a layer's weight in nn.Transformer's layers."""
    norms = {"attention_norm": "norm1", "mlp_norm": "norm2" if part == "encoder" else "norm3", "reading_norm": "norm2"}
    if module in norms:
        return f"{norms[module]}.weight"
    if module == "mlp":
        return {"up.weight": "linear1.weight", "down.weight": "linear2.weight"}[leaf]
    attention = {"attention": "self_attn", "reading": "multihead_attn"}[module]
    return f"{attention}.out_proj.weight" if leaf == "output.weight" else f"{attention}.{leaf.removesuffix('.weight')}"


both = pytest.mark.parametrize("copies", [False, True])


def test_it_computes_what_torchs_own_transformer_does() -> None:
    model = small()
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), plain(model, *inputs()), atol=1e-4, rtol=1e-4)


@both
def test_no_position_sees_what_follows_it_and_none_sees_padding(copies: bool) -> None:
    model = small(copies=copies)
    source, length, target = inputs()
    with torch.no_grad():
        output = model(source, length, target)
        later = target.clone()
        later[:, 5:] = 7
        changed = model(source, length, later)
        assert torch.equal(changed[:, :5], output[:, :5])
        assert not torch.allclose(changed[:, 5:], output[:, 5:])
        padded = torch.where(torch.arange(9) < length.unsqueeze(1), source, 3)
        assert torch.equal(model(padded, length, target), output)
        wider = torch.nn.functional.pad(source, (0, 3), value=5)
        torch.testing.assert_close(model(wider, length, target), output, atol=1e-5, rtol=1e-4)
        read = source.clone()
        read[:, 0] = 3
        assert (model(read, length, target) - output).abs().amax(2).min() > 1e-4  # every position reads the source


@both
def test_written_step_by_step_it_gives_the_same_logits(copies: bool) -> None:
    model = small(copies=copies)
    source, length, target = inputs()
    cache = model.new_cache()
    with torch.no_grad():
        whole = model(source, length, target)
        steps = [model(source, length, target[:, step : step + 1], cache=cache) for step in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
        cache = model.new_cache()  # the rows in another order, and a beginning of more than one position
        model(source, length, target[:, :4], cache=cache)
        order = torch.tensor([2, 0, 0])
        cache.select(order)
        after = model(source[order], length[order], target[order, 4:5], cache=cache)
    torch.testing.assert_close(after[:, 0], whole[order, 4], atol=1e-4, rtol=1e-4)


@both
def test_the_weights_of_its_attention_are_those_it_uses(copies: bool) -> None:
    model = small(copies=copies)
    source, length, target = inputs()
    with torch.no_grad():
        cache = model.new_cache(keeps_weights=True)
        output = model(source, length, target, cache=cache)
        torch.testing.assert_close(output, model(source, length, target), atol=1e-5, rtol=1e-4)
        seen = [layer.weights for layer in cache.layers]
        assert [each.shape for each in seen] == [(3, 4, 9, 9)] * 2
        for weights in seen:
            torch.testing.assert_close(weights.sum(3), torch.ones(3, 4, 9))
            assert not weights[1, :, :, 5:].any() and (weights[2, :, :, 0] == 1).all()
        layer = model.decoder[0]
        taken: list[Tensor] = []
        handle = layer.reading.output.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
        model(source, length, target)
        handle.remove()
    mixed = (seen[0] @ cache.layers[0].read[1]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(taken[0], mixed, atol=1e-5, rtol=1e-4)


# --- copying


def test_what_it_copies_is_mixed_with_what_it_generates() -> None:
    """Position by position, id by id (See et al. 2017, equation 9)."""
    model = small(copies=True)
    source, length, target = inputs()
    source[:, 3] = source[:, 1]  # an id that stands there twice counts twice
    given: dict[str, Tensor] = {}
    for name in ("head", "gate"):
        module = getattr(model, name)
        module.register_forward_hook(lambda _, __, output, name=name: given.update({name: output}))
    with torch.no_grad():
        cache = model.new_cache()
        output = model(source, length, target, cache=cache)
    assert cache.layers[0].weights is None and cache.layers[1].weights is not None
    for row in range(3):
        for step in range(9):
            p_gen = float(given["gate"][row, step].sigmoid())
            expected = p_gen * given["head"][row, step].softmax(0)
            for place in range(int(length[row])):
                weight = float(cache.layers[1].weights[row, 0, step, place])
                expected[source[row, place]] += (1 - p_gen) * weight
            torch.testing.assert_close(output[row, step].exp(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(output[row, step].softmax(0), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gate", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixtures_and_their_gradients_stay_finite(gate: float, dtype: torch.dtype) -> None:
    """Also where an id is neither generated nor copied by any probability that fp32 can hold."""
    logits = torch.tensor([[[0.0, -1e4, 1e4, 3.0]]], dtype=dtype, requires_grad=True)
    gates = torch.full((1, 1, 1), gate, dtype=dtype, requires_grad=True)
    attention = torch.tensor([[[1.0, 0.0, 0.0]]], requires_grad=True)
    mixed = seq2seq.mixture(logits, gates, attention, torch.tensor([[3, 1, 1]]))
    assert mixed.dtype == torch.float32 and mixed.isfinite().all()
    assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-3)  # what fp32 resolves of 1e4
    assert mixed.argmax() == (3 if gate < 0 else 2)
    mixed.sum().backward()
    for each in (logits, gates, attention):
        assert each.grad is not None and each.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_copies_with_weights_of_16_bits(dtype: torch.dtype) -> None:
    model = small(copies=True)
    with torch.no_grad():
        whole = model(*inputs())
        torch.testing.assert_close(model.to(dtype)(*inputs()).exp(), whole.exp(), atol=0.05, rtol=0)


def test_it_learns_to_copy_from_fewer_texts() -> None:
    """Texts of random ids, to be written as they are read."""
    losses = {}
    for copies in (False, True):
        config = seq2seq.Config(encoder_layers=1, decoder_layers=1, hidden_size=32, num_heads=2, copies=copies)
        model = built(BoundModel(seq2seq, config, TokenPair(VOCAB, SEQ_LEN), Logits(VOCAB)))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            text = torch.randint(1, VOCAB, (32, 6), generator=generator)
            before = nn.functional.pad(text[:, :-1], (1, 0), value=EOS)
            loss = nn.functional.cross_entropy(model(text, torch.full((32,), 6), before).flatten(0, 1), text.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[copies] = loss.item()
    assert losses[True] < 0.1 * losses[False], losses


# --- beam search


class Table(nn.Module):
    """Says by a table (length written, last id) -> logits, whatever it reads."""

    def __init__(self, table: Tensor, seq_len: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.table, self.seq_len = table, seq_len

    def new_cache(self) -> Table.Cache:
        return Table.Cache()

    class Cache:
        length = 0

        def select(self, rows: Tensor) -> None:
            pass

    def forward(self, source: Tensor, length: Tensor, target: Tensor, cache: Table.Cache) -> Tensor:
        cache.length += target.shape[1]
        return self.table[cache.length - 1, target]


def every_sequence(table: Tensor, limit: int) -> dict[tuple[int, ...], float]:
    """Normalised log-probability of every sequence that ends, at the latest (for free) at the limit."""
    found: dict[tuple[int, ...], float] = {}

    def grow(ids: tuple[int, ...], total: float) -> None:
        scores = table[len(ids), ids[-1] if ids else EOS].log_softmax(0)
        if len(ids) + 1 == limit:
            found[ids] = total / float(penalty(torch.tensor(limit)))
            return
        for token, score in enumerate(scores.tolist()):
            if token == EOS:
                found[ids] = (total + score) / float(penalty(torch.tensor(len(ids) + 1)))
            else:
                grow((*ids, token), total + score)

    grow((), 0.0)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_with_enough_beams_it_finds_the_best_of_all_sequences(seed: int) -> None:
    table = 2 * torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed))
    expected = max((every := every_sequence(table, 4)), key=every.__getitem__)
    (found,) = beam_search(Table(table, 4), torch.ones(1, 1), torch.tensor([1]), beam_size=64, eos_id=EOS)
    assert tuple(found) == expected


@both
def test_one_beam_takes_the_likeliest_id_each_time_as_without_a_cache(copies: bool) -> None:
    model = small(copies=copies)
    source, length, _ = inputs()
    found = beam_search(model, source, length, beam_size=1, eos_id=EOS)
    for number, ids in enumerate(found):
        limit = min(2 * int(length[number]) + 10, SEQ_LEN)
        written: list[int] = []
        while len(written) + 1 < limit:
            target = torch.tensor([[EOS, *written]])
            with torch.no_grad():
                token = int(model(source[number : number + 1], length[number : number + 1], target)[0, -1].argmax())
            if token == EOS:
                break
            written.append(token)
        assert ids == written


@both
@pytest.mark.parametrize("beams", [1, 3])
def test_a_translation_does_not_depend_on_the_others_of_its_batch(beams: int, copies: bool) -> None:
    model = small(seed=3, copies=copies)
    source, length, _ = inputs()
    together = beam_search(model, source, length, beam_size=beams, eos_id=EOS)
    for number, ids in enumerate(together):
        one = slice(number, number + 1)
        assert beam_search(model, source[one], length[one], beam_size=beams, eos_id=EOS) == [ids]
    assert len(set(map(tuple, together))) > 1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_heads=3"):
        seq2seq.Config(**(SMALL | {"num_heads": 3}))
