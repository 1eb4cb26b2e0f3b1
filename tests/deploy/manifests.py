"""What API servers that refuse unknown fields would say of a manifest: KubeRay's own schemas, and Kubernetes' own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kustomize import Manifest, containers
from tests.deploy.tools import EXTRA

SCHEMAS = Path(__file__).parents[1] / "cluster" / "schemas"
KUBERNETES = "1.34.0"
CUSTOM = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def pods(manifest: Any) -> list[Manifest]:
    """Every pod's spec in a manifest."""
    if isinstance(manifest, dict):
        own = [manifest] if "containers" in manifest else []
        return own + [pod for value in manifest.values() for pod in pods(value)]
    return [pod for item in manifest for pod in pods(item)] if isinstance(manifest, list) else []


@cache
def custom_schema(kind: str) -> dict[str, Any]:
    """A custom resource's own schema, which refuses what it does not name."""
    definition = yaml.load((SCHEMAS / CUSTOM[kind]).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema: dict[str, Any] = closed(version["schema"]["openAPIV3Schema"])
    return schema


def closed(schema: Any) -> Any:
    """The schema, in which an object has no property but those that are named."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in found or found.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(found.get("properties"), dict) and found.get("type") == "object" and not is_open:
        found["additionalProperties"] = False
    if found.pop("x-kubernetes-int-or-string", False):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    return found


def faults(manifest: Manifest) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(custom_schema(manifest["kind"]))
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


def taken_by_kubernetes(manifest: Manifest) -> None:
    """Each pod in it, and itself if it is of no custom kind."""
    validate = pytest.importorskip("kubernetes_validate", reason=f"needs kubernetes-validate: {EXTRA}")
    if manifest["kind"] not in CUSTOM:
        validate.validate(manifest, KUBERNETES, strict=True)
    for pod in pods(manifest):
        metadata = {"name": "pod", "namespace": "n"}
        shown = {"restartPolicy": "Always"} | pod
        complete = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": shown}
        validate.validate(complete, KUBERNETES, strict=True)


def restricted(manifest: Manifest) -> None:
    """Its pods pass the pod security standard `restricted`, without the service account's token, within bounds."""
    for pod in pods(manifest):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] >= 999
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in containers(manifest):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        if container["name"] != "submitter":  # it ends with the job
            assert {"readinessProbe", "livenessProbe"} <= container.keys()
