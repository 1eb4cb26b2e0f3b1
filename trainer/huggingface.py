"""Models as Hugging Face folders, and a GPT back from one.

A model of the library itself (trainer/models/hf.py) is written by the library. Every tensor of trainer/models/gpt.py
has its counterpart in its `LlamaForCausalLM`. Only the rows of query and key are in another order: here a rotary pair
is two neighbouring rows of a head (Su et al. 2021), there row i of the head's first half and row i of its second.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import Damaged, NotFound, UsageError
from data_pipelines.local_files import explain, sync_folder
from trainer.models import gpt, hf
from trainer.shapes import Logits, Tokens

if TYPE_CHECKING:
    from data_pipelines.tokenizer import Tokenizer

MAX_FILE_BYTES = 4 * 2**30  # of one weights file; a larger model is written as several, with an index

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def export_llama(
    weights: Mapping[str, Tensor], config: gpt.Config, io: tuple[Tokens, Logits], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write config, weights and tokenizer as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    weights: full tensors by the names of the GPT's parameters; read one after another, so a lazy mapping is fine.

    Raises what _whole_folder raises, and
        Damaged: `weights` lacks a parameter.
    """
    with _whole_folder(Path(folder)) as temporary:
        dtype = _write_weights(weights, config, temporary)
        _write_json(temporary / "config.json", _llama_config(config, io, tokenizer, dtype))
        _write_tokenizer(tokenizer, io[0].seq_len, temporary)


def export_own(model: hf.Wrapped, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write a model of transformers, and its tokenizer if it reads text, as a folder that from_pretrained loads.

    Raises what _whole_folder raises.
    """
    inner = model.inner
    if tokenizer is not None:
        for mark in ("bos_token_id", "eos_token_id"):
            setattr(inner.config, mark, tokenizer.eos_id)
    with _whole_folder(Path(folder)) as temporary:
        inner.save_pretrained(temporary)
        for path in temporary.iterdir():
            _sync_file(path)
        if tokenizer is not None:
            assert model.seq_len is not None
            _write_tokenizer(tokenizer, model.seq_len, temporary)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which appears as `folder` at the end, by a rename; after an error nothing of it stays.

    Raises:
        UsageError: something is at `folder` already.
        ShardyardError: it cannot be written (disk full, no permission).
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists already, and an export never overwrites. Name a new folder, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            sync_folder(temporary)
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder.parent)
    except OSError as error:
        raise explain(error, "export to", folder) from error


def _llama_config(
    config: gpt.Config, io: tuple[Tokens, Logits], tokenizer: Tokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": io[1].size,
        "max_position_embeddings": io[0].seq_len,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks, which also refuses other keys below it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # where transformers 5 looks
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": tokenizer.eos_id,  # a document begins with the end of the one before
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write_tokenizer(tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    definition = json.loads(tokenizer.to_json())
    eos = next(token["content"] for token in definition["added_tokens"] if token["id"] == tokenizer.eos_id)
    # A prompt gets the mark that begins every document in training.
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": eos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}},
    }
    _write_json(folder / "tokenizer.json", definition)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    marks = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **marks})


def _write_weights(weights: Mapping[str, Tensor], config: gpt.Config, folder: Path) -> torch.dtype:
    """Write the weights, converted to Llama's names and order; returns their dtype."""
    from safetensors.torch import save_file

    files: list[list[str]] = []
    total_bytes = 0
    for group in _groups(_to_llama(weights, config)):
        path = folder / f"part-{len(files)}"
        save_file(group, path, metadata={"format": "pt"})
        _sync_file(path)
        files.append(list(group))
        total_bytes += sum(tensor.nbytes for tensor in group.values())
        dtype = next(iter(group.values())).dtype
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return dtype
    where: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        where |= dict.fromkeys(names, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": where})
    return dtype


def _to_llama(weights: Mapping[str, Tensor], config: gpt.Config) -> Iterator[tuple[str, Tensor]]:
    for name, llama_name in _names(config):
        if name not in weights:
            raise Damaged(f"The weights have no {name}, so they are of another model. Check where they are from.")
        tensor = weights[name].detach().cpu()
        heads = _rotated_heads(name, config)
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield llama_name, tensor.contiguous()


def _groups(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size_bytes = 0
    for name, tensor in tensors:
        if group and size_bytes + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group, size_bytes = {}, 0
        group[name] = tensor
        size_bytes += tensor.nbytes
    yield group


def _names(config: gpt.Config) -> Iterator[tuple[str, str]]:
    """(our name, Llama's name) of each parameter, tied ones once."""
    for name, llama_name in _OUTER.items():
        if name != "head.weight" or not config.tie_embeddings:
            yield name, llama_name
    for layer in range(config.num_layers):
        for name, llama_name in _IN_BLOCK.items():
            yield f"blocks.{layer}.{name}", f"model.layers.{layer}.{llama_name}"


def _rotated_heads(name: str, config: gpt.Config) -> int | None:
    """How many heads a matrix of queries or keys holds; None for the others."""
    if name.endswith("attention.query.weight"):
        return config.num_heads
    return config.kv_heads if name.endswith("attention.key.weight") else None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def llama_settings(folder: Path) -> dict[str, Any]:
    """Settings of `model: {name: gpt}` for a Hugging Face Llama folder; its weights are not read.

    Raises:
        NotFound: no such folder, or no config.json in it. Damaged: it cannot be read, or is no Llama's.
        UsageError: the model has something that the GPT has not.
    """
    path = Path(folder) / "config.json"
    try:
        settings = _gpt_settings(_read_json(path), Path(folder))
        gpt.Config(**settings)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise Damaged(f"{path} does not describe a Llama ({cause[:200]}). Copy it again.") from error
    return settings


def import_llama(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings of `model: {name: gpt}`, tensors by our names, in their stored dtype) of a Hugging Face Llama folder.

    A tied head has no tensor of its own.

    Raises:
        NotFound: no such folder, or no config.json or weights in it.
        UsageError: the model has something that the GPT has not.
        Damaged: a file cannot be read, or does not fit config.json.
    """
    folder = Path(folder)
    settings = llama_settings(folder)
    config = gpt.Config(**settings)
    stored = _read_weights(folder)
    weights = {}
    for name, llama_name in _names(config):
        if llama_name not in stored:
            raise Damaged(f"{folder} has no tensor {llama_name}, which its config.json asks for. Copy it again.")
        tensor = stored.pop(llama_name)
        heads = _rotated_heads(name, config)
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        weights[name] = tensor
    left = [name for name in stored if "rotary" not in name and name != "lm_head.weight"]
    if left:
        raise UsageError(f"{folder} holds tensors that gpt has no place for: {', '.join(sorted(left)[:5])}.")
    return settings, weights


def _gpt_settings(llama: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if llama.get("model_type") != "llama":
        raise UsageError(f"{folder} holds a model of type {llama.get('model_type')!r}; gpt can take 'llama' only.")
    rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    width, heads = llama["hidden_size"], llama["num_attention_heads"]
    needed = {
        "hidden_act": (llama.get("hidden_act", "silu"), "silu"),
        "attention_bias": (llama.get("attention_bias", False), False),
        "mlp_bias": (llama.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "head_dim": (llama.get("head_dim") or width // heads, width // heads),
    }
    other = [f"{name}={found} (gpt has {ours})" for name, (found, ours) in needed.items() if found != ours]
    if other:
        raise UsageError(f"{folder} differs from what gpt can be: {'; '.join(other)}. Use another model.")
    return {
        "num_layers": llama["num_hidden_layers"],
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": llama.get("num_key_value_heads") or heads,
        "intermediate_size": llama["intermediate_size"],
        "tie_embeddings": llama.get("tie_word_embeddings", False),
        "rope_theta": float(rope.get("rope_theta") or llama.get("rope_theta") or 10000.0),
        "norm_eps": float(llama.get("rms_norm_eps", 1e-6)),
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(_read_json(index)["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError as error:
            raise NotFound(f"{folder} has no {name}: only safetensors can be read. Copy it, or convert it.") from error
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{folder / name} cannot be read: {error}. Copy it again.") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain(error, "read", path) from error
    except ValueError as error:
        raise Damaged(f"{path} is no JSON: {error}. Copy it again.") from error
