"""BERT beside transformers' own, and what its masks promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.initialization import materialize
from trainer.models import bert
from trainer.shapes import ClassLogits, MaskedLogits, Tokens

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
VOCAB, LENGTH = 60, 16


def small(output: Any, **settings: Any) -> nn.Module:
    config = bert.Config(**(SMALL | settings))
    with torch.device("meta"):
        model = bert.build(config, Tokens(VOCAB, LENGTH), output)

    def wide(name: str, tensor: Tensor, generator: torch.Generator) -> None:  # so that every part shows in the output
        bert.init_parameter(config, name, tensor, generator)
        tensor.add_(torch.empty_like(tensor).normal_(0.0, 0.2, generator=generator))

    materialize(model, wide, seed=0)
    return model.eval()


def theirs(kind: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    model: nn.Module = getattr(transformers, kind)(config)
    return model.eval()


def by_their_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Our parameters, by the names that they have in a BertModel."""
    ours = dict(model.named_parameters())
    names = bert.pretrained_names(bert.Config(num_layers=1, hidden_size=2, num_heads=1), ours, ())
    return {names[name]: parameter for name, parameter in ours.items()}


def take_over(model: nn.Module, peer: nn.Module) -> None:
    """Copy every weight of ours into the peer's, by the names that pretrained_names gives."""
    found = {name.removeprefix("bert."): parameter for name, parameter in peer.named_parameters()}
    ours = by_their_names(model)
    if missing := found.keys() - ours.keys():  # a module that the peer has beside those that are compared
        assert all(name.startswith("pooler.") for name in missing), missing
    assert ours.keys() <= found.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            found[name].copy_(parameter)


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(1, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("output", "kind"),
    [(MaskedLogits(VOCAB), "BertForMaskedLM"), (ClassLogits(3), "BertForSequenceClassification")],
)
def test_logits_are_those_of_transformers(output: Any, kind: str) -> None:
    model, peer = small(output), theirs(kind)
    take_over(model, peer)
    lengths = torch.tensor([LENGTH, 5, 9])
    inside = torch.arange(LENGTH) < lengths.unsqueeze(1)
    with torch.no_grad():
        ours = model(tokens(), (~inside).long())
        expected = peer(tokens(), attention_mask=inside.long()).logits
    if isinstance(output, MaskedLogits):
        ours, expected = ours[inside], expected[inside]
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_mean_is_over_the_last_states_of_transformers() -> None:
    model, peer = small(ClassLogits(3), pooling="mean"), theirs("BertModel")
    found = by_their_names(model)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if not name.startswith("pooler."):
                parameter.copy_(found[name])
        inside = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5], [9]])
        states = peer(tokens(), attention_mask=inside.long()).last_hidden_state
        mean = torch.stack([state[keep].mean(0) for state, keep in zip(states, inside, strict=True)])
        torch.testing.assert_close(model(tokens(), (~inside).long()), model.head.classifier(mean), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_is_asked_of_the_whole_does_not_see_padding(pooling: str) -> None:
    model, ids = small(ClassLogits(3), pooling=pooling), tokens(1)
    document = (torch.arange(LENGTH) >= 7).long().unsqueeze(0)
    other = torch.where(document == 1, ids % 7 + 1, ids)
    with torch.no_grad():
        padded, changed, alone = model(ids, document), model(other, document), model(ids[:, :7])
        assert not torch.equal(model(ids), model(other))
    assert torch.equal(padded, changed)
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)


def test_documents_of_a_sequence_do_not_see_each_other_and_see_both_sides() -> None:
    model, ids = small(MaskedLogits(VOCAB)), tokens(1)
    document = (torch.arange(LENGTH) >= 6).long().unsqueeze(0)
    position = torch.arange(LENGTH).unsqueeze(0) - 6 * document
    with torch.no_grad():
        together = model(ids, document, position)
        apart = torch.cat([model(ids[:, :6]), model(ids[:, 6:])], 1)
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
        changed = ids.clone()
        changed[0, 10] = ids[0, 10] % (VOCAB - 1) + 1
        differs = (model(changed, document, position) != together).any(-1)[0]
    assert differs[6:].all() and not differs[:6].any()


@pytest.mark.parametrize("policy", [True, "selective"])
def test_activation_checkpointing_changes_no_gradient(policy: bool | str) -> None:
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    gradients, flops = [], []
    for each in (False, policy):
        model = small(MaskedLogits(VOCAB), dropout=0.2, activation_checkpointing=each).train()
        torch.manual_seed(5)  # of dropout
        total = model(tokens).float().logsumexp(-1).sum()
        with FlopCounterMode(display=False) as counter:
            total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        flops.append(counter.get_total_flops())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert (flops[1] > flops[0]) is (policy is True)
