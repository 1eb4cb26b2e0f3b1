"""Configs of the transformers library, made of a run's (trainer/models/hf.py)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UsageError

if TYPE_CHECKING:
    from trainer.models.hf import Config


def library_config(config: Config, use: str, sizes: Mapping[str, int]) -> Any:
    """What transformers calls a config. sizes: what the task says of the architecture, where it has such a setting.

    Raises:
        UsageError: there is no such architecture, folder or setting, or a setting cannot have its value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    described = _described(config)
    kind = described.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UsageError(f"transformers knows no architecture '{kind}'.{_near(kind, CONFIG_MAPPING.keys())}")
    try:
        usual = CONFIG_MAPPING[kind]()
        for key in config.settings:
            if not hasattr(usual, key):
                raise UsageError(f"{config.source} has no setting '{key}'.{_near(key, usual.to_dict())}")
        changes = {key: value for key, value in sizes.items() if hasattr(usual, key)}
        padding = described.get("pad_token_id", getattr(usual, "pad_token_id", None))
        if "max_position_embeddings" in changes:
            if config.folder is not None or "max_position_embeddings" in config.settings:
                del changes["max_position_embeddings"]
            elif padding:
                changes["max_position_embeddings"] += padding + 1  # see _first_position
        if use == "text" and padding is None:
            changes["pad_token_id"] = 0  # as texts are padded: a decoder looks for the last token before it
        if use != "image":
            changes |= {"use_cache": False} if hasattr(usual, "use_cache") else {}
        return CONFIG_MAPPING[kind].from_dict(described | changes)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"transformers refuses {config.source}: {brief(error)} Change model.settings.") from error


def _described(config: Config) -> dict[str, Any]:
    """The architecture's name and settings, those of a folder below the user's own."""
    if config.folder is None:
        return {"model_type": config.architecture, **config.settings}
    path = Path(config.folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {brief(error)} Check model.folder.") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise UsageError(f"{path} names no model_type, so it describes no model. Check model.folder.")
    if "quantization_config" in found:
        raise UsageError(
            f"{path} describes quantized weights, which cannot be trained. Use the model that they are of."
        )
    return {**found, **config.settings}


def _near(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 3)
    return f" Near to it: {', '.join(near)}." if near else ""


def brief(error: Exception) -> str:
    """An error of the library as a sentence."""
    text = " ".join(str(error).split())
    return f"{text[:300].rstrip('.')}."
