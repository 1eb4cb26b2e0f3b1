"""Any architecture of the transformers library (Wolf et al. 2020, arXiv:1910.03771), under every ZeRO stage.

An architecture is named by its model type (llama, gpt2, bert, vit, ...) or described by a local folder with a
config.json. Its code is the library's; weights, data and training are Shardyard's, and no code that comes with a model
is ever run. What the task knows is set from it: the sizes of vocabulary, sequence and image, the number of outputs.

Documents that share a sequence are kept apart by the mask, and each is counted from 0. BatchNorm is Shardyard's, whose
statistics do not depend on how examples are spread over workers.

B = examples, T = tokens, V = vocabulary, N = outputs, S = height and width of an image, C = channels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import UsageError
from configs.schema import Section
from trainer.parts.batch_norm import BatchNorm2d
from trainer.parts.library_config import brief, library_config
from trainer.shapes import ClassLogits, Image, Logits, MaskedLogits, Tokens, Values

ACCEPTS = (Tokens, Image)
GIVES = (Logits, MaskedLogits, ClassLogits, Values)

# The library's class for each use of an architecture. Names of parameters begin with the use.
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


class Config(Section):
    """Which architecture, and what differs from its defaults."""

    architecture: str | None = Field(
        default=None, min_length=1, description="A model type of transformers: llama, gpt2, bert, vit, ..."
    )
    folder: str | None = Field(
        default=None, min_length=1, description="Instead of it, a folder with a config.json, on every worker's disk."
    )
    settings: dict[str, Any] = Field(
        default={}, description="Settings of the architecture that differ, by the names that transformers gives them."
    )

    @model_validator(mode="after")
    def _one_is_named(self) -> Config:
        if (self.architecture is None) == (self.folder is None):
            raise ValueError("set one of model.architecture and model.folder, and not the other")
        return self

    @property
    def source(self) -> str:
        """What the architecture is known by."""
        return f"architecture '{self.architecture}'" if self.folder is None else f"{self.folder}/config.json"


def example(input: Tokens | Image, output: object) -> Config | None:
    """A small one that takes this input and gives this output; None where there is none."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if isinstance(input, Image):
        vit = Config(architecture="vit", settings={**sizes, "patch_size": 4})
        return vit if isinstance(output, ClassLogits | Values) else None
    return Config(architecture="llama" if isinstance(output, Logits) else "bert", settings=sizes)


# --- the module


class Wrapped(nn.Module):
    """A module of transformers that is called as trainer/shapes.py says. use: a key of CLASSES."""

    def __init__(self, model: nn.Module, use: str, seq_len: int | None) -> None:
        super().__init__()
        self.use = use
        self.seq_len = seq_len
        self.add_module(use, model)
        self.first_position = _first_position(model)
        self._takes_position = "position_ids" in inspect.signature(model.forward).parameters

    @property
    def inner(self) -> Any:
        """The library's own module."""
        return self.get_submodule(self.use)

    def forward(self, x: Tensor, document: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Of an image (B, C, S, S): (B, N). Of tokens (B, T), with or without document and position, each (B, T):
        (B, T, V), or (B, N) for document 0. In the dtype of the weights.
        """
        if self.use == "image":
            return self.inner(pixel_values=x).logits
        if self.use == "text":
            return self.inner(input_ids=x, attention_mask=None if document is None else (document == 0).long()).logits
        if document is None:
            document = torch.zeros_like(x)
        if position is None:
            position = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        given = {"position_ids": position.long() + self.first_position} if self._takes_position else {}
        return self.inner(input_ids=x, attention_mask=self._mask(document), **given).logits

    def _mask(self, document: Tensor) -> Tensor:
        """(B, T): what is added to scores, (B, 1, T, T): 0 where a token may look, else the least number."""
        unseen = document.unsqueeze(2) != document.unsqueeze(1)
        if self.use == "causal":
            unseen = unseen | torch.ones_like(unseen[0]).triu(1)
        dtype = next(self.parameters()).dtype
        mask = torch.zeros(unseen.shape, dtype=dtype, device=document.device)
        return mask.masked_fill(unseen, torch.finfo(dtype).min).unsqueeze(1)


def _first_position(model: nn.Module) -> int:
    """RoBERTa and its kin count positions from behind the number of their padding mark (Liu et al. 2019)."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return int(getattr(module, "padding_idx")) + 1  # noqa: B009 - no attribute that torch knows
    return 0


def build(config: Config, input: Tokens | Image, output: Any) -> Wrapped:
    """The architecture with a head for the output.

    Raises:
        UsageError: transformers does not know it, has no such head for it, or cannot build it of these settings.
    """
    use = _use(input, output)
    if isinstance(input, Image):
        if input.height != input.width:
            raise UsageError(f"hf takes square images, and these are {input.height} x {input.width} pixels.")
        sizes = {"image_size": input.height, "num_channels": input.channels, "num_labels": output.size}
        return Wrapped(_built(config, use, sizes), use, None)
    sizes = {"vocab_size": input.vocab_size, "max_position_embeddings": input.seq_len}
    if use == "text":
        sizes["num_labels"] = output.size
    model = Wrapped(_built(config, use, sizes), use, input.seq_len)
    rows, needed = getattr(model.inner.config, "max_position_embeddings", None), input.seq_len + model.first_position
    if rows is not None and rows < needed:
        raise UsageError(
            f"{config.source} has {rows} positions, and a task.seq_len of {input.seq_len} needs {needed}. Set a "
            f"smaller task.seq_len{'' if config.folder else ', or model.settings.max_position_embeddings'}."
        )
    return model


def _use(input: Tokens | Image, output: object) -> str:
    if isinstance(output, ClassLogits | Values):
        return "image" if isinstance(input, Image) else "text"
    if isinstance(input, Image):
        raise UsageError(f"hf gives no {type(output).__name__} of an image. Use another model.")
    return "causal" if isinstance(output, Logits) else "masked"


def _built(config: Config, use: str, sizes: Mapping[str, int]) -> Any:
    """The library's module, with Shardyard's BatchNorm and with buffers that can be filled by themselves."""
    import transformers

    transformers.logging.set_verbosity_error()  # it would speak of its own ways to load and to generate
    transformers.logging.disable_progress_bar()
    own = library_config(config, use, sizes)
    auto: Any = getattr(transformers, CLASSES[use])
    if type(own) not in auto._model_mapping:
        some = sorted({kind.model_type for kind in auto._model_mapping})[::20]
        raise UsageError(f"{config.source} has no {CLASSES[use]}, which the task needs. Some have: {', '.join(some)}.")
    try:
        model = auto.from_config(own, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError, AttributeError, KeyError) as error:
        raise UsageError(f"transformers cannot build {config.source}: {brief(error)} Change model.settings.") from error
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _replace_batch_norm(config, model, name, module)
        elif module._buffers:
            fill = functools.partial(_fill_buffers, module, f"{use}.{name}", config)
            module.reset_buffers = fill  # type: ignore[assignment]
    return model


def _replace_batch_norm(config: Config, model: nn.Module, name: str, theirs: Any) -> None:
    """Put Shardyard's into its place, under the same names."""
    if type(theirs) is not nn.BatchNorm2d or not theirs.affine or theirs.momentum is None:
        raise UsageError(
            f"{config.source} has a {type(theirs).__name__} ('{name}') whose statistics cannot be kept alike on all "
            "workers. Use another architecture."
        )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, BatchNorm2d(theirs.num_features, theirs.momentum, theirs.eps))


# --- whether it can do the task


def misfit(config: Config, input: Tokens | Image, output: Any) -> str | None:
    """Why this architecture cannot do the task; None if it can. It is run once, without memory or values."""
    try:
        with torch.device("meta"):
            model = build(config, input, output)
        if model.use in ("causal", "masked") and (reason := _cannot_pack(model)) is not None:
            return f"{config.source} {reason}"
        _count_flops(model, input)
    except UsageError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        return f"{config.source} cannot compute what the task asks: {brief(error)} Change model.settings."
    return None


def _cannot_pack(model: Wrapped) -> str | None:
    """Why documents that share a sequence would not be kept apart; None if they are."""
    inner = model.inner
    if inner._is_stateful or not (inner._supports_sdpa or inner._supports_attention_backend):
        return (
            "does not attend by a mask of the library's kind, so documents that share a sequence would see each "
            "other. Use another architecture, or a task that reads each text by itself."
        )
    assert model.seq_len is not None
    for key in ("sliding_window", "attention_chunk_size"):
        window = getattr(inner.config, key, None)
        if isinstance(window, int) and window < model.seq_len:
            return (
                f"sees {window} tokens ({key}), fewer than task.seq_len={model.seq_len}, and packed documents are "
                f"masked as a whole. Set model.settings.{key} to null, or a smaller task.seq_len."
            )
    return None


# --- first values


def init_parameter(config: Config, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """As transformers does: by the rules of the module that holds it, and of those around that."""
    _fill(config, name, tensor, generator.initial_seed())
    if not tensor.isfinite().all():
        raise UsageError(
            f"transformers has no rule for the first value of '{name}' of {config.source}. Use warm_start, or another "
            "architecture."
        )


def _fill(config: Config, name: str, tensor: Tensor, seed: int) -> None:
    """Give a parameter or buffer its first value, in place.

    The library's rules fill whole modules. So they are let loose on one without memory, in which this tensor alone has
    some.
    """
    blank = _blank(config.model_dump_json(), name.partition(".")[0])
    path, _, attribute = name.rpartition(".")
    owner = blank.get_submodule(path)
    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    if isinstance(owner, BatchNorm2d):
        tensor.fill_(1.0 if attribute == "weight" else 0.0)
        return
    with _in_place_of(owner, attribute, tensor), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while path:
            blank.inner._init_weights(blank.get_submodule(path))
            path = path.rpartition(".")[0]


def _fill_buffers(module: nn.Module, path: str, config: Config) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            values = torch.empty_like(buffer, device="cpu")
            _fill(config, f"{path}.{name}", values, 0)
            buffer.copy_(values)


@functools.lru_cache(maxsize=4)
def _blank(config: str, use: str) -> Wrapped:
    """A module without memory, of a Config as JSON and of the library's own sizes of vocabulary and the like."""
    with torch.device("meta"):
        return Wrapped(_built(Config.model_validate_json(config), use, {}), use, None)


@contextmanager
def _in_place_of(owner: nn.Module, attribute: str, tensor: Tensor) -> Iterator[None]:
    held: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
    blank = held[attribute]
    held[attribute] = nn.Parameter(tensor, requires_grad=False) if held is owner._parameters else tensor
    try:
        yield
    finally:
        held[attribute] = blank


# --- counted, as there is no formula for them all


def num_parameters(config: Config, input: Tokens | Image, output: Any) -> int:
    """Trainable values, tied ones counted once."""
    with torch.device("meta"):
        return sum(each.numel() for each in build(config, input, output).parameters() if each.requires_grad)


def flops_per_example(config: Config, input: Tokens | Image, output: Any) -> float:
    """Of all matrix products, forward and backward, over a full sequence or an image."""
    with torch.device("meta"):
        return _count_flops(build(config, input, output), input)


def _count_flops(model: Wrapped, input: Tokens | Image) -> float:
    if isinstance(input, Image):
        x = torch.empty(1, input.channels, input.height, input.width, device="meta")
    else:
        x = torch.zeros(1, input.seq_len, dtype=torch.int64, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x).sum().backward()
    return float(counter.get_total_flops())


def pretrained_names(config: Config, names: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """What parameters are called in weights of transformers that hold the tensors `stored`.

    The library renames some of them as it reads them, and so it is done here. What it puts together from several
    tensors, or takes apart, is not found.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    wanted = {name: name.partition(".")[2] for name in names}
    use = next(iter(wanted)).partition(".")[0]
    inner = _blank(config.model_dump_json(), use).inner
    renamings = [each for each in get_model_conversion_mapping(inner) if type(each) is WeightRenaming]
    known = inner.state_dict()
    there = {rename_source_key(name, renamings, [], inner.base_model_prefix, known)[0]: name for name in stored}
    return {name: there.get(own, own) for name, own in wanted.items()}
