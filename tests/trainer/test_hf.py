"""Architectures of transformers, as models of ours: the library itself is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UsageError
from configs.load import load
from configs.problems import ConfigError
from configs.schema import WarmStartConfig
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from tests.tiny import tiny_config
from tests.trainer.attempts import state, train
from trainer.bound import BoundModel
from trainer.checkpoint import find
from trainer.generate import generate
from trainer.huggingface import export_own
from trainer.inference import load_model
from trainer.initialization import materialize
from trainer.models import hf
from trainer.parts.batch_norm import RunningStatistics
from trainer.record import RunRecord
from trainer.shapes import ClassLogits, Image, Logits, MaskedLogits, Tokens
from trainer.validate import validate
from trainer.warm_start import warm

VOCAB, LENGTH = 90, 12
TEXT = Tokens(VOCAB, LENGTH)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CAUSAL = {
    "llama": SMALL | {"num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "mistral": SMALL | {"num_key_value_heads": 1, "head_dim": 8},
    "qwen2": SMALL | {"num_key_value_heads": 1},
    "gpt_neox": SMALL,
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
    },
}
MASKED = {
    "bert": SMALL,
    "roberta": SMALL,
    "electra": SMALL | {"embedding_size": 16},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}


def bound(architecture: str, input: Any = TEXT, output: Any = None, **settings: Any) -> BoundModel:
    config = hf.Config(architecture=architecture, settings=settings)
    return BoundModel(hf, config, input, output or Logits(VOCAB))


def filled(model: BoundModel, seed: int = 5) -> hf.Wrapped:
    with torch.device("meta"):
        module: nn.Module = model.build()
    materialize(module, model.init_parameter, seed=seed)
    assert isinstance(module, hf.Wrapped)
    return module.eval()


def ids(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (1, length), generator=generator) for length in lengths]


# --- documents


@pytest.mark.parametrize(
    ("architecture", "output", "settings"),
    [
        *((name, Logits(VOCAB), settings) for name, settings in CAUSAL.items()),
        *((name, MaskedLogits(VOCAB), settings) for name, settings in MASKED.items()),
    ],
)
def test_documents_that_share_a_sequence_are_as_if_alone(architecture: str, output: Any, settings: Any) -> None:
    model = (
        bound(architecture, output=output, initializer_range=0.3, **settings)
        if architecture != "opt"
        else bound(architecture, output=output, init_std=0.3, **settings)
    )
    assert hf.misfit(model.config, model.input, model.output) is None
    module = filled(model)
    first, second = ids(5, 7)
    document = torch.tensor([[0] * 5 + [1] * 7])
    position = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        together = module(torch.cat([first, second], 1), document, position)
        alone = torch.cat([module(first), module(second)], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    if isinstance(output, Logits):  # no token sees those behind it
        changed = torch.cat([first[:, :-1], (first[:, -1:] + 1) % VOCAB], 1)
        with torch.no_grad():
            torch.testing.assert_close(module(changed)[:, :-1], module(first)[:, :-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "roberta"])
def test_padding_of_a_text_changes_nothing(architecture: str) -> None:
    settings = CAUSAL.get(architecture) or MASKED[architecture]
    module = filled(bound(architecture, output=ClassLogits(3), initializer_range=0.3, **settings))
    (text,) = ids(6)
    padded = torch.cat([text, torch.full((1, 4), module.inner.config.pad_token_id)], 1)
    document = torch.tensor([[0] * 6 + [1] * 4])
    with torch.no_grad():
        torch.testing.assert_close(module(padded, document), module(text), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "settings", "said"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}, "documents that share a sequence would see each other"),
        ("mistral", CAUSAL["mistral"] | {"sliding_window": 4}, r"sees 4 tokens \(sliding_window\)"),
        ("llama", SMALL | {"hidden_sise": 32}, r"no setting 'hidden_sise'. Near to it: hidden_size"),
        ("llama", SMALL | {"hidden_size": "wide"}, "'hidden_size' expected int"),
        ("llama", SMALL | {"max_position_embeddings": 8}, "has 8 positions, and a task.seq_len of 12 needs 12"),
        ("lama", {}, "no architecture 'lama'. Near to it: llama"),
        ("vit", {}, "has no AutoModelForCausalLM"),
        ("bert", {"pad_token_id": 5000}, "cannot build|refuses"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(architecture: str, settings: Any, said: str) -> None:
    import re

    reason = hf.misfit(hf.Config(architecture=architecture, settings=settings), TEXT, Logits(VOCAB))
    assert reason is not None and re.search(said, reason), reason


def test_a_config_names_one_architecture() -> None:
    for wrong in ({}, {"architecture": "bert", "folder": "there"}):
        with pytest.raises(ValueError, match=r"set one of model\.architecture and model\.folder"):
            hf.Config(**wrong)


def test_an_image_that_is_no_square_and_an_image_task_that_it_has_not() -> None:
    config = hf.Config(architecture="vit", settings=SMALL | {"patch_size": 4})
    assert "square" in str(hf.misfit(config, Image(3, 16, 8), ClassLogits(2)))
    assert "no Logits of an image" in str(hf.misfit(config, Image(3, 16, 16), Logits(2)))


# --- first values


def test_first_values_are_the_library_s_own() -> None:
    """Standard deviations of every kind of weight, GPT-2's scaled ones among them; constants exactly."""
    import transformers

    settings = {"n_embd": 256, "n_layer": 2, "n_head": 2}
    module = filled(bound("gpt2", **settings))
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, **settings))
    theirs = dict(peer.named_parameters())
    assert {name.removeprefix("causal.") for name, _ in module.named_parameters()} == set(theirs)
    for name, ours in module.named_parameters():
        other = theirs[name.removeprefix("causal.")]
        assert ours.mean().item() == pytest.approx(other.mean().item(), abs=4e-3), name
        assert ours.std().item() == pytest.approx(other.std().item(), rel=0.15, abs=1e-6), name
    assert not torch.equal(*(module.inner.transformer.h[layer].attn.c_attn.weight for layer in (0, 1)))


@pytest.mark.parametrize(
    ("architecture", "settings", "kind"),
    [
        ("llama", SMALL, "LlamaForCausalLM"),
        ("bert", SMALL, "BertForMaskedLM"),
        ("roberta", SMALL, "RobertaForMaskedLM"),
        ("vit", SMALL | {"patch_size": 4}, "ViTForImageClassification"),
        (
            "resnet",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            "ResNetForImageClassification",
        ),
    ],
)
def test_warm_started_it_computes_what_the_library_does(
    architecture: str, settings: Any, kind: str, tmp_path: Path
) -> None:
    import transformers

    is_image = architecture in ("vit", "resnet")
    input: Any = Image(3, 16, 16) if is_image else TEXT
    output: Any = ClassLogits(5) if is_image else (Logits if architecture == "llama" else MaskedLogits)(VOCAB)
    sizes: dict[str, Any] = (
        {"num_channels": 3, "num_labels": 5} | ({"image_size": 16} if architecture == "vit" else {})
        if is_image
        else {"vocab_size": VOCAB, "max_position_embeddings": LENGTH + 2 * (architecture == "roberta")}
    )
    torch.manual_seed(0)
    own = transformers.AutoConfig.for_model(architecture, **settings, **sizes)
    peer = getattr(transformers, kind)(own).train()
    if architecture == "resnet":  # statistics that are no new model's
        with torch.no_grad():
            peer(torch.randn(8, 3, 16, 16) * 2 + 1)
    peer.eval().save_pretrained(tmp_path)
    example = torch.randn(2, 3, 16, 16) if is_image else ids(LENGTH)[0]

    for config in (hf.Config(architecture=architecture, settings=settings), hf.Config(folder=str(tmp_path))):
        model = warm(BoundModel(hf, config, input, output), WarmStartConfig(weights=str(tmp_path)))
        assert [name for name in model.unused if "num_batches_tracked" not in name] == []
        module = filled(model)
        with torch.no_grad():
            torch.testing.assert_close(module(example), peer(example).logits, atol=1e-5, rtol=1e-4)


def test_running_statistics_are_moved_by_the_engine_alone() -> None:
    """So that they do not depend on how micro-batches are spread over workers (trainer/parts/batch_norm.py)."""
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    module = filled(bound("resnet", Image(3, 16, 16), ClassLogits(5), **settings)).train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers() if "running" in name}
    module(torch.randn(4, 3, 16, 16) + 3)
    assert before and all(torch.equal(module.get_buffer(name), values) for name, values in before.items())
    statistics = RunningStatistics(module)
    statistics.add(0)
    statistics.fold(1)
    assert not any(torch.equal(module.get_buffer(name), values) for name, values in before.items())


def test_weights_below_a_head_are_found_and_the_head_is_new(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **SMALL))
    base.save_pretrained(tmp_path)
    model = bound("bert", output=ClassLogits(3), **SMALL)
    with pytest.raises(UsageError, match=r"'text.classifier.weight' is \(3, 16\) .* 'classifier.weight' is missing"):
        warm(model, WarmStartConfig(weights=str(tmp_path)))
    module = filled(warm(model, WarmStartConfig(weights=str(tmp_path), fresh=("text.classifier",))))
    for name, ours in module.inner.bert.named_parameters():
        assert torch.equal(ours, base.get_parameter(name)), name


def test_a_folder_is_described_by_its_config_alone(tmp_path: Path) -> None:
    config = hf.Config(folder=str(tmp_path))
    assert "config.json cannot be read" in str(hf.misfit(config, TEXT, Logits(VOCAB)))
    path = tmp_path / "config.json"
    for content, said in (
        ("{", "cannot be read"),
        ("[]", "names no model_type"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}', "knows no architecture 'mine'"),
        (json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}), "quantized"),
    ):
        path.write_text(content)
        assert said in str(hf.misfit(config, TEXT, Logits(VOCAB))), content
    (tmp_path / "evil.py").write_text("raise SystemExit('code that came with a model was run')\n")
    evil = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}} | SMALL
    path.write_text(json.dumps(evil))
    assert hf.misfit(config, TEXT, Logits(VOCAB)) is None


# --- runs


@pytest.mark.distributed
def test_a_run_goes_on_at_another_world_size_and_generates(tmp_path: Path) -> None:
    model = {"name": "hf", "architecture": "llama", "settings": SMALL}
    whole, cut = (tiny_config(tmp_path / name, steps=4, model=model) for name in ("whole", "cut"))
    record = train(whole, world_size=1)
    train(cut, world_size=2, stop_after=1)
    train(cut, world_size=1)
    expected, found = state(record, 4), state(RunRecord.open(cut["store"], cut["name"]), 4)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-3)
    module, tokenizer = load_model(find(record.store.child("checkpoints")))
    ids_ = list(generate(module, [], max_tokens=5, seed=3, eos_id=tokenizer.eos_id))
    assert ids_ == list(generate(module, [], max_tokens=5, seed=3, eos_id=tokenizer.eos_id))


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_an_export_is_what_from_pretrained_loads(kind: str, tmp_path: Path) -> None:
    import transformers

    is_image = kind == "resnet"
    model = (
        bound("resnet", Image(3, 16, 16), ClassLogits(5), embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        if is_image
        else bound("llama", **SMALL)
    )
    module = filled(model)
    example = torch.randn(2, 3, 16, 16) if is_image else ids(LENGTH)[0]
    if is_image:
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(0.3)
    tokenizer = None if is_image else train_tokenizer(TokenizerConfig(name="bytes"), [])
    export_own(module, tokenizer, tmp_path / "out")
    auto = transformers.AutoModelForImageClassification if is_image else transformers.AutoModelForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(auto.from_pretrained(tmp_path / "out")(example).logits, module(example))
    with pytest.raises(UsageError, match="never overwrites"):
        export_own(module, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_check_names_the_key_and_the_remedy(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model={"name": "hf", "architecture": "lama"})
    with pytest.raises(ConfigError, match=r"model.*no architecture 'lama'. Near to it: llama"):
        validate(load(config))
