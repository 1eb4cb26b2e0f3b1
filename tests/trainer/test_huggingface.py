from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import Damaged, NotFound, UsageError
from data_pipelines.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tests.trainer.models import SMALL, small_gpt
from trainer import huggingface
from trainer.generate import generate
from trainer.huggingface import export_llama, import_llama
from trainer.models import gpt
from trainer.shapes import Logits, Tokens

SETTINGS: list[dict[str, Any]] = [
    {"tie_embeddings": True},
    {"tie_embeddings": False, "num_kv_heads": 2},
    {"tie_embeddings": True, "num_kv_heads": 1, "rope_theta": 500.0, "norm_eps": 1e-3, "intermediate_size": 40},
]
TEXT = "def f(x):\n    return x + 1  # naïve 漢字\n" * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=300), [TEXT])


def export(folder: Path, tokenizer: Tokenizer, **settings: Any) -> gpt.GPT:
    model = small_gpt(vocab_size=300, **settings).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export_llama(weights, gpt.Config(**(SMALL | settings)), (Tokens(300, 24), Logits(300)), tokenizer, folder)
    return model


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, Tensor) else result.logits


def tokens(vocab_size: int = 300) -> Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", SETTINGS)
def test_transformers_loads_the_export_with_equal_logits(
    settings: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoModelForCausalLM

    model = export(tmp_path / "out", tokenizer, **settings)
    llama, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, theirs = logits_of(model, tokens()), logits_of(llama, tokens())
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert llama.config.max_position_embeddings == 24
    assert sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_way_back_gives_the_same_model(settings: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = export(tmp_path / "out", tokenizer, **settings)
    found, weights = import_llama(tmp_path / "out")
    config, original = gpt.Config(**found), gpt.Config(**(SMALL | settings))
    assert (config.kv_heads, config.mlp_size, config.rope_theta) == (
        original.kv_heads,
        original.mlp_size,
        original.rope_theta,
    )
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    assert all(torch.equal(weights[name], parameters[name]) for name in parameters)
    again = gpt.build(config, Tokens(300, 24), Logits(300)).eval()
    again.load_state_dict(weights, strict=False)
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_by_transformers_is_imported(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        tie_word_embeddings=tied,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path)
    settings, weights = import_llama(tmp_path)
    assert settings["rope_theta"] == 777.0
    model = gpt.build(gpt.Config(**settings), Tokens(64, 32), Logits(64)).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["head.weight"] if tied else [])
    torch.testing.assert_close(logits_of(model, tokens(64)), logits_of(llama, tokens(64)), atol=1e-4, rtol=1e-4)


def test_the_tokenizer_goes_along_and_begins_a_text_as_training_did(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = export(tmp_path / "out", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def g(y):\n    return y  # 漢字"
    ids = tokenizer.encode([text])[0].tolist()
    assert theirs(text)["input_ids"] == [tokenizer.eos_id, *ids]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eos_id

    prompt = theirs("def", return_tensors="pt")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    continued = llama.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    start = prompt["input_ids"][0].tolist()
    expected = list(generate(model, start, max_tokens=8, temperature=0, seed=0, eos_id=tokenizer.eos_id))
    assert continued[len(start) :][: len(expected)] == expected


def test_the_tokenizer_can_be_read_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    export(tmp_path / "out", tokenizer)
    again = Tokenizer.from_json((tmp_path / "out" / "tokenizer.json").read_text())
    assert again.encode([TEXT])[0].tolist() == tokenizer.encode([TEXT])[0].tolist()
    assert again.eos_id == tokenizer.eos_id


def test_a_large_model_is_written_as_several_files(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(huggingface, "MAX_FILE_BYTES", 45_000)
    model = export(tmp_path / "out", tokenizer, tie_embeddings=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2 and all(file.stat().st_size < 50_000 for file in files)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(llama, tokens()), logits_of(model, tokens()), atol=1e-4, rtol=1e-4)
    _, weights = import_llama(tmp_path / "out")
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_bf16_weights_stay_bf16(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_gpt(vocab_size=300).bfloat16()
    weights = dict(model.named_parameters())
    export_llama(weights, gpt.Config(**SMALL), (Tokens(300, 24), Logits(300)), tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in import_llama(tmp_path / "out")[1].values())


def entries(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())


def test_an_export_never_overwrites(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "out", tokenizer)
    assert list(entries(tmp_path / "out")) == ["mine"]
    assert list(entries(tmp_path)) == ["out"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", tokenizer)
    assert "config.json" in entries(tmp_path / "out")


def test_a_failed_export_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    weights = dict(small_gpt(vocab_size=300).named_parameters())
    del weights["blocks.1.mlp.up.weight"]
    with pytest.raises(Damaged, match=r"blocks\.1\.mlp\.up\.weight"):
        export_llama(weights, gpt.Config(**SMALL), (Tokens(300, 24), Logits(300)), tokenizer, tmp_path / "out")
    assert list(entries(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_what_the_gpt_is_not_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    export(tmp_path / "out", tokenizer)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=named):
        import_llama(tmp_path / "out")


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "out"
    with pytest.raises(NotFound, match=r"config\.json"):
        import_llama(folder)
    export(folder, tokenizer)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        import_llama(folder)
    weights.unlink()
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        import_llama(folder)
    weights.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    with pytest.raises(Damaged, match="JSON"):
        import_llama(folder)
    for damaged in (
        [],
        {key: value for key, value in config.items() if key != "hidden_size"},
        config | {"num_attention_heads": 0},
        config | {"num_hidden_layers": "2"},
    ):
        (folder / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(Damaged, match=r"config\.json"):
            import_llama(folder)
