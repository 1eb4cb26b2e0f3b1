"""The part of kustomize that deploy/kubernetes uses, and nothing more: what it does not know it refuses.

resources, namespace, images (newTag), patches (JSON6902), configMapGenerator (files, without suffix). With it the files
are tested where there is no kubectl; where there is one, a test sees that both render the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches", "configMapGenerator"}
_OF_NO_NAMESPACE = {"Namespace"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization, in its order."""
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert asked.keys() <= _KNOWN, f"{folder}: {asked.keys() - _KNOWN}"
    manifests: list[Manifest] = []
    for resource in asked["resources"]:
        path = folder / resource
        manifests += render(path) if path.is_dir() else [m for m in yaml.safe_load_all(path.read_text()) if m]
    manifests = [_without_aliases(manifest) for manifest in manifests]  # a patch is for one place, not for its aliases
    manifests += [_config_map(folder, generator) for generator in asked.get("configMapGenerator", [])]
    for patch in asked.get("patches", []):
        _patch(manifests, patch)
    for manifest in manifests:
        if "namespace" in asked and manifest["kind"] not in _OF_NO_NAMESPACE:
            manifest["metadata"]["namespace"] = asked["namespace"]
        for image in asked.get("images", []):
            _set_tag(manifest, image)
    return manifests


def containers(value: Any) -> Iterator[Manifest]:
    """Every container of every pod in a manifest, however deep."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers"):
                yield from item
            yield from containers(item)
    elif isinstance(value, list):
        for item in value:
            yield from containers(item)


def _without_aliases(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _config_map(folder: Path, generator: dict[str, Any]) -> Manifest:
    assert generator.keys() == {"name", "files", "options"}
    assert generator["options"] == {"disableNameSuffixHash": True}
    data = {name: (folder / name).read_text() for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _patch(manifests: list[Manifest], patch: dict[str, Any]) -> None:
    target = patch["target"]
    assert patch.keys() == {"target", "patch"} and target.keys() <= {"kind", "name"}
    chosen = [
        manifest
        for manifest in manifests
        if all(found == target.get(key, found) for key, found in _identity(manifest).items())
    ]
    assert chosen, f"nothing is {target}"
    for manifest in chosen:
        for operation in yaml.safe_load(patch["patch"]):
            _operate(manifest, **operation)


def _identity(manifest: Manifest) -> dict[str, str]:
    return {"kind": manifest["kind"], "name": manifest["metadata"]["name"]}


def _operate(manifest: Manifest, op: str, path: str, value: Any) -> None:
    """One operation of RFC 6902, with the pointers of RFC 6901."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/")]
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if isinstance(place, list):
        assert op == "add" and last == "-"
        place.append(value)
    else:
        assert op == "add" or (op == "replace" and last in place), path
        place[last] = value


def _set_tag(manifest: Manifest, image: dict[str, str]) -> None:
    assert image.keys() == {"name", "newTag"}
    for container in containers(manifest):
        name, _, _ = container["image"].partition(":")
        if name == image["name"]:
            container["image"] = f"{name}:{image['newTag']}"
