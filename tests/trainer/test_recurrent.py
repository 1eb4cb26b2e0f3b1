"""The recurrent networks against torch's own with packed sequences, and what must not change their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import UsageError
from configs.plugins import find_plugin
from tests.contract.examples import built
from tests.trainer.attempts import curve, train
from trainer.bound import BoundModel
from trainer.shapes import ClassLogits, Frames, Logits, Tokens, Values

LENGTHS = torch.tensor([3, 7, 1, 5])
VOCAB_SIZE = 11


def model(name: str, input: Any, output: Any, **settings: Any) -> nn.Module:
    module = find_plugin("trainer.models", name)
    config = module.Config(**({"num_layers": 2, "hidden_size": 6} | settings))
    return built(BoundModel(module, config, input, output))


def frames(seed: int = 0) -> Tensor:
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(seed))


def reference(network: nn.Module, kind: str, *, bidirectional: bool) -> nn.RNNBase:
    """torch's module with the same weights."""
    oracle: nn.RNNBase = getattr(nn, kind)(5, 6, num_layers=2, batch_first=True, bidirectional=bidirectional)
    state = {}
    for name, value in network.stack.state_dict().items():  # layers.0.forwards.weight_ih
        _, number, direction, weight = name.split(".")
        state[f"{weight}_l{number}{'_reverse' if direction == 'reverse' else ''}"] = value
    oracle.load_state_dict(state)
    return oracle


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [("lstm", {}, "LSTM"), ("rnn", {"cell": "gru"}, "GRU"), ("rnn", {"cell": "tanh"}, "RNN")],
)
def test_it_is_torchs_network_on_packed_sequences(
    name: str, settings: dict[str, Any], kind: str, bidirectional: bool
) -> None:
    network = model(name, Frames(5, 7), Values(2), bidirectional=bidirectional, **settings)
    oracle = reference(network, kind, bidirectional=bidirectional)
    packed = pack_padded_sequence(frames(), LENGTHS, batch_first=True, enforce_sorted=False)
    outputs, last = oracle(packed)
    wanted, _ = pad_packed_sequence(outputs, batch_first=True)  # zeros where nothing is
    hidden = last[0] if kind == "LSTM" else last
    states = network.stack(frames(), LENGTHS)
    valid = (torch.arange(7) < LENGTHS.unsqueeze(1)).unsqueeze(-1)
    torch.testing.assert_close(states * valid, wanted)
    final = torch.cat(list(hidden[-2:] if bidirectional else hidden[-1:]), dim=-1)
    torch.testing.assert_close(network(frames(), LENGTHS), network.head(final))

    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (wanted * upstream).sum().backward()
    (states * valid * upstream).sum().backward()
    for key, parameter in oracle.named_parameters():
        weight, _, rest = key.rpartition("_l")
        direction = "reverse" if rest.endswith("_reverse") else "forwards"
        ours = network.get_parameter(f"stack.layers.{rest[0]}.{direction}.{weight}")
        torch.testing.assert_close(ours.grad, parameter.grad, msg=key)


@pytest.mark.parametrize("pooling", ["last", "mean", "mean_max", None])
@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_padding_changes_nothing(name: str, pooling: str | None) -> None:
    output = Logits(3) if pooling is None else ClassLogits(3)
    settings = {} if pooling is None else {"pooling": pooling}
    network = model(name, Frames(5, 9), output, bidirectional=True, **settings).eval()
    alone = [network(row[:length].unsqueeze(0), length.view(1)) for row, length in zip(frames(), LENGTHS, strict=True)]
    padded = torch.cat([frames(), torch.full((4, 2, 5), 50.0)], dim=1)
    padded[torch.arange(9) >= LENGTHS.unsqueeze(1)] = -30.0
    together = network(padded, LENGTHS)
    for row, (length, wanted) in enumerate(zip(LENGTHS.tolist(), alone, strict=True)):
        found = together[row, :length] if pooling is None else together[row]
        torch.testing.assert_close(found, wanted[0])


def test_pooling_is_what_it_says() -> None:
    network = model("lstm", Frames(5, 7), Values(2), pooling="mean_max").eval()
    states = network.stack(frames(), LENGTHS)
    pooled = [
        torch.cat([row[:length].mean(0), row[:length].max(0).values])
        for row, length in zip(states, LENGTHS.tolist(), strict=True)
    ]
    torch.testing.assert_close(network(frames(), LENGTHS), network.head(torch.stack(pooled)))


def test_documents_of_a_sequence_do_not_see_each_other() -> None:
    network = model("lstm", Tokens(VOCAB_SIZE, 8), Logits(VOCAB_SIZE)).eval()
    tokens = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
    together = network(tokens, document)
    for row, start, end in [(0, 0, 3), (0, 3, 7), (0, 7, 8), (1, 0, 5), (1, 5, 8)]:
        torch.testing.assert_close(together[row, start:end], network(tokens[row : row + 1, start:end])[0])


@pytest.mark.parametrize("pooling", ["last", "mean", "mean_max"])
def test_of_the_whole_input_only_document_0_counts(pooling: str) -> None:
    network = model("rnn", Tokens(VOCAB_SIZE, 8), ClassLogits(3), bidirectional=True, pooling=pooling).eval()
    tokens = torch.randint(VOCAB_SIZE, (1, 8), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2]])
    torch.testing.assert_close(network(tokens, document), network(tokens[:, :5]))


@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_reading_in_reverse_what_is_to_be_predicted_is_refused(name: str) -> None:
    module = find_plugin("trainer.models", name)
    config = module.Config(num_layers=1, hidden_size=4, bidirectional=True)
    shapes = Tokens(VOCAB_SIZE, 8), Logits(VOCAB_SIZE)
    for refused in (module.build, module.num_parameters):  # the second is asked when a config is checked
        with pytest.raises(UsageError, match=r"Set model\.bidirectional=false"):
            refused(config, *shapes)
    module.build(config, Frames(5, 8), Logits(VOCAB_SIZE))


@pytest.mark.distributed
def test_cut_among_workers_it_learns_the_same(tmp_path: Path) -> None:
    """At stage 3 the weights are there only while their module runs; in bf16 the kernels are others."""

    def losses(stage: int, precision: str) -> list[float]:
        task = {"name": "language_modeling", "seq_len": 16, "tokenizer": {"name": "bytes"}}
        record = train(
            {
                "name": f"stage{stage}-{precision}",
                "steps": 4,
                "store": str(tmp_path),
                "task": task,
                "model": {"name": "lstm", "num_layers": 2, "hidden_size": 32},
                "data": {"name": "tests.generated", "task": task},
                "batch": {"global_batch_size": 4, "micro_batch_size": 2},
                "optimizer": {"lr": 1e-2},
                "zero": {"stage": stage},
                "precision": precision,
                "resources": {"workers": 2},
                "evaluation": {"every": None, "sample_tokens": 4},
                "tracking": {"mlflow": None},
            },
        )
        return [row["loss"] for row in curve(record)]

    whole = losses(0, "fp32")
    assert whole[-1] < whole[0]
    assert losses(3, "fp32") == pytest.approx(whole, rel=1e-5)
    assert losses(3, "bf16") == pytest.approx(whole, rel=2e-2)


@pytest.mark.parametrize("kernel_size", [1, 4, 5])
def test_a_convolution_in_front_sees_around_each_moment_and_no_padding(kernel_size: int) -> None:
    network = model("lstm", Frames(5, 9), Logits(3), bidirectional=True, kernel_size=kernel_size).eval()
    padded = torch.cat([frames(), torch.full((4, 2, 5), 1e3)], dim=1)
    padded[torch.arange(9) >= LENGTHS.unsqueeze(1)] = float("nan")
    with torch.no_grad():
        together = network(padded, LENGTHS)
        for number, length in enumerate(LENGTHS.tolist()):
            alone = network(frames()[number : number + 1, :length], LENGTHS[number : number + 1])
            torch.testing.assert_close(together[number : number + 1, :length], alone)
        weight, bias = network.convolution.weight, network.convolution.bias
        before = (kernel_size - 1) // 2
        around = torch.nn.functional.pad(frames()[:1, :3], (0, 0, before, kernel_size - 1 - before))[0]
        sums = [torch.einsum("kc,hck->h", around[at : at + kernel_size], weight) + bias for at in range(3)]
        states = network.head(network.stack(torch.stack(sums).relu().unsqueeze(0), LENGTHS[:1]))
    torch.testing.assert_close(together[:1, :3], states)


def test_a_convolution_is_counted() -> None:
    module = find_plugin("trainer.models", "lstm")
    config = module.Config(num_layers=2, hidden_size=6, bidirectional=True, kernel_size=3)
    bound = BoundModel(module, config, Frames(5, 9), Logits(3))
    network = built(bound)
    assert bound.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    with torch.backends.mkldnn.flags(enabled=False), counter:
        network(torch.randn(1, 9, 5), torch.tensor([9])).sum().backward()
    assert bound.flops_per_example() == counter.get_total_flops()
