"""The kinds of objects that a Kubernetes API server knows, and what it demands of one before it is stored.

After kubernetes.io: "Object Names and IDs", "Labels and Selectors", "Kubernetes API Concepts" (Field validation), and
the project's "API conventions" (Metadata, Response Status Kind). Messages have the real server's form; none has been
compared with a running one.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.cluster.kubernetes.fields import Object
from tests.cluster.kubernetes.schema import OPEN, Cause, Schema, check, fill, prune, read_definition

_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_ANYTHING: Schema = {"type": "object", **OPEN}
_TEXT: Schema = {"type": "string"}
_NAMES = ("name", "generateName", "namespace", "uid", "resourceVersion", "selfLink")
METADATA: Schema = {
    "type": "object",
    "properties": {
        **{name: _TEXT for name in (*_NAMES, "creationTimestamp", "deletionTimestamp")},
        **{name: _TEXTS for name in ("labels", "annotations")},
        "finalizers": {"type": "array", "items": _TEXT},
        "ownerReferences": {"type": "array", "items": _ANYTHING},
        "managedFields": {"type": "array", "items": _ANYTHING},
        "generation": {"type": "integer"},
        "deletionGracePeriodSeconds": {"type": "integer"},
    },
}
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_LABEL = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_NAME_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and"
    f" end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN}')"
)
_LABEL_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and"
    " end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is"
    f" '{_LABEL}')"
)
_KEY_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric"
    " character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is"
    " '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)


@dataclass(frozen=True)
class Resource:
    """A resource type. custom: defined by a CustomResourceDefinition. fields: what field selectors may name."""

    group: str
    version: str
    plural: str
    kind: str
    schema: Schema = field(hash=False)
    namespaced: bool = True
    custom: bool = False
    fields: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Of its paths."""
        return f"apis/{self.api_version}" if self.group else f"api/{self.version}"

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def has_status(self) -> bool:
        """A subresource of its own: other writes leave it alone."""
        return "status" in self.schema["properties"]


def resource(group: str, version: str, plural: str, kind: str, properties: Schema, **more: Any) -> Resource:
    """properties: of the schema, beside those that each object has."""
    own = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": METADATA}
    schema: Schema = {"type": "object", "properties": {**properties, **own}}
    fields = ("metadata.name", "metadata.namespace", *more.pop("fields", ()))
    return Resource(group, version, plural, kind, schema, fields=fields, **more)


def custom_resource(path: Path) -> Resource:
    """Of a definition's file, in the version that is stored."""
    read = read_definition(path)
    version = next(version for version in read["versions"] if version["storage"])
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    names = read["names"]
    return resource(read["group"], version["name"], names["plural"], names["kind"], properties, custom=True)


_WHOLE: Schema = {"spec": _ANYTHING, "status": _ANYTHING}
_DATA: Schema = {"data": _TEXTS, "immutable": {"type": "boolean"}}
_EVENT_TEXTS = ("action", "eventTime", "firstTimestamp", "lastTimestamp", "message", "reason", "reportingComponent")
_EVENT: Schema = {
    **{name: _TEXT for name in (*_EVENT_TEXTS, "reportingInstance", "type")},
    **{name: _ANYTHING for name in ("involvedObject", "related", "series", "source")},
    "count": {"type": "integer"},
}
_INVOLVED = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
_POD_FIELDS = ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "status.phase")
_KUEUE = ("kueue.x-k8s.io", "v1beta1")
BUILT_IN = (
    resource("", "v1", "namespaces", "Namespace", _WHOLE, namespaced=False, fields=("status.phase",)),
    resource("", "v1", "nodes", "Node", _WHOLE, namespaced=False, fields=("spec.unschedulable",)),
    resource("", "v1", "pods", "Pod", _WHOLE, fields=(*_POD_FIELDS, "status.podIP", "status.nominatedNodeName")),
    resource(
        *("", "v1", "events", "Event", _EVENT),
        fields=("reason", "reportingComponent", "type", *(f"involvedObject.{name}" for name in _INVOLVED)),
    ),
    resource("", "v1", "configmaps", "ConfigMap", _DATA | {"binaryData": _TEXTS}),
    resource("", "v1", "secrets", "Secret", _DATA | {"stringData": _TEXTS, "type": _TEXT}, fields=("type",)),
    resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", _WHOLE),
    resource("", "v1", "resourcequotas", "ResourceQuota", _WHOLE),
    resource("batch", "v1", "jobs", "Job", _WHOLE, fields=("status.successful",)),
    # Of Kueue's objects nothing below spec and status is checked.
    resource(*_KUEUE, "workloads", "Workload", _WHOLE, custom=True),
    resource(*_KUEUE, "localqueues", "LocalQueue", _WHOLE, custom=True),
    resource(*_KUEUE, "clusterqueues", "ClusterQueue", _WHOLE, custom=True, namespaced=False),
)


class ApiError(Exception):
    """An answer that is a `Status` ("API conventions", Response Status Kind)."""

    def __init__(
        self, code: int, reason: str, message: str, details: Object | None = None, metadata: Object | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.details, self.metadata = code, reason, details, metadata or {}

    def status(self) -> Object:
        """The body of the answer."""
        status = {"kind": "Status", "apiVersion": "v1", "metadata": self.metadata, "status": "Failure"}
        status |= {"message": str(self)} | ({"reason": self.reason} if self.reason else {})
        return status | ({"details": self.details} if self.details else {}) | {"code": self.code}


def details(of: Resource, name: str = "", **more: Any) -> Object:
    """Of a Status."""
    found = {"name": name, "group": of.group, "kind": of.plural, **more}
    return {key: value for key, value in found.items() if value}


def not_found(of: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{of.qualified} "{name}" not found', details(of, name))


def already_exists(of: Resource, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{of.qualified} "{name}" already exists', details(of, name))


def conflict(of: Resource, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    text = f'Operation cannot be fulfilled on {of.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", text, details(of, name))


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def unrecognized(kind: str, why: str) -> ApiError:
    return bad_request(f"the object provided is unrecognized (must be of type {kind}): {why}")


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> ApiError:
    found = [f"{cause.field}: {cause.message}" for cause in causes]
    text = f'{kind}{"." * bool(group)}{group} "{name}" is invalid: '
    text += found[0] if len(found) == 1 else f"[{', '.join(found)}]"
    listed = [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes]
    more = {"name": name, "group": group, "kind": kind, "causes": listed}
    return ApiError(422, "Invalid", text, {key: value for key, value in more.items() if value})


def invalid_option(kind: str, name: str, message: str, reason: str = "FieldValueInvalid") -> ApiError:
    """A parameter of a request that is not allowed."""
    return invalid("meta.k8s.io", kind, "", [Cause(name, reason, message)])


@dataclass
class Decoding:
    """fieldValidation of a request. unknown: Strict, Warn or Ignore; warnings: filled for the answer's headers."""

    unknown: str = "Warn"
    repeated: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def readable(of: Resource, namespace: str, name: str, body: Object) -> Object:
    """The object of a request, checked against where it was sent."""
    handled = f'{body.get("kind")} in version "{str(body.get("apiVersion")).rpartition("/")[2]}" cannot be handled'
    if not body.get("kind") or not body.get("apiVersion"):
        missing = "apiVersion" if body.get("kind") else "Kind"
        raise unrecognized(of.kind, f"Object '{missing}' is missing in '{json.dumps(body)[:30]}'")
    if body["kind"] != of.kind:
        raise bad_request(f"{handled} as a {of.kind}")
    if body["apiVersion"] != of.api_version:
        text = f"the API version in the data ({body['apiVersion']}) does not match the expected API version"
        raise bad_request(f"{text} ({of.api_version})")
    new = copy.deepcopy(body)
    metadata = new["metadata"] = new.get("metadata") or {}
    for cause in check({"metadata": metadata}, {"type": "object", "properties": {"metadata": METADATA}}):
        if cause.reason == "FieldValueTypeInvalid" and "null" not in cause.message:
            raise bad_request(f"{handled} as a {of.kind}: {_go_error(cause)}")
    if name and metadata.setdefault("name", name) != name:
        text = f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
        raise bad_request(text)
    if of.namespaced and metadata.setdefault("namespace", namespace) != namespace:
        raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
    return new


def admit(of: Resource, new: Object, old: Object | None, decoding: Decoding) -> None:
    """Unknown fields ("Field validation"), defaults, then all that is wrong at once."""
    unknown = [f'duplicate field "{path}"' for path in decoding.repeated]
    unknown += [f'unknown field "{path}"' for path in prune(new, of.schema)]
    handled = f'{of.kind} in version "{of.version}" cannot be handled as a {of.kind}'
    if unknown and decoding.unknown == "Strict":
        raise bad_request(f"{handled}: strict decoding error: {', '.join(unknown)}")
    decoding.warnings += unknown if decoding.unknown == "Warn" else []
    fill(new, of.schema)
    causes = check(new, of.schema, old)
    if causes and not of.custom:
        raise bad_request(f"{handled}: {_go_error(causes[0])}")
    if of.plural == "secrets":
        _encode_secret(new, handled)
    name = new["metadata"].get("name", "")
    causes = [*_metadata_causes(new["metadata"]), *_size_causes(of, new), *causes]
    if causes:
        raise invalid(of.group, of.kind, name, causes)


def now() -> str:
    """As metadata has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _go_error(cause: Cause) -> str:
    """Of a wrong type in what the server itself decodes."""
    types = re.findall(r'"(\w+)"|of type (\w+)', cause.message)
    found, wanted = types[0][0].replace("integer", "number").replace("boolean", "bool"), types[1][1]
    return f"json: cannot unmarshal {found} into Go struct field {cause.field} of type {wanted}"


def _encode_secret(new: Object, handled: str) -> None:
    """`stringData` is for writing alone ("Secrets")."""
    texts = new.pop("stringData", {})
    if texts:
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        new["data"] = new.get("data", {}) | encoded
    for text in new.get("data", {}).values():
        try:
            base64.b64decode(text, validate=True)
        except binascii.Error:
            raise bad_request(f"{handled}: illegal base64 data at input byte 0") from None


def _metadata_causes(metadata: Object) -> Iterator[Cause]:
    name = metadata.get("name", "")
    if not name:
        yield Cause("metadata.name", "FieldValueRequired", "Required value: name or generateName is required")
    elif not re.fullmatch(_SUBDOMAIN, name):
        yield _bad("metadata.name", name, _NAME_RULE)
    if len(name) > 253:
        yield _bad("metadata.name", name, "must be no more than 253 bytes")
    for key, value in metadata.get("labels", {}).items():
        if not re.fullmatch(_LABEL, value):
            yield _bad("metadata.labels", value, _LABEL_RULE)
        if len(value) > 63:
            yield _bad("metadata.labels", value, "must be no more than 63 bytes")
        yield from _key_causes("metadata.labels", key)
    for key in metadata.get("annotations", {}):
        yield from _key_causes("metadata.annotations", key)
    if sum(len(part.encode()) for pair in metadata.get("annotations", {}).items() for part in pair) > 262144:
        yield Cause("metadata.annotations", "FieldValueTooLong", "Too long: may not be more than 262144 bytes")


def _key_causes(where: str, key: str) -> Iterator[Cause]:
    prefix, slash, name = key.rpartition("/")
    if not name or not re.fullmatch(_LABEL, name):
        yield _bad(where, key, _KEY_RULE)
    if len(name) > 63:
        yield _bad(where, key, "name part must be no more than 63 bytes")
    if slash and not re.fullmatch(_SUBDOMAIN, prefix.lower()):
        yield _bad(where, key, f"prefix part {_NAME_RULE}")


def _size_causes(of: Resource, new: Object) -> Iterator[Cause]:
    """ "ConfigMaps" and "Secrets": at most 1 MiB."""
    if of.plural in ("configmaps", "secrets"):
        texts = [text for part in ("data", "binaryData") for text in new.get(part, {}).values()]
        coded = of.plural == "secrets"
        size = sum(len(base64.b64decode(text)) if coded else len(text.encode()) for text in texts)
        if size > 1024**2:
            where = "data" if coded else "[]"
            yield Cause(where, "FieldValueTooLong", f"Too long: may not be more than {1024**2} bytes")


def _bad(where: str, value: str, rule: str) -> Cause:
    return Cause(where, "FieldValueInvalid", f"Invalid value: {json.dumps(value)}: {rule}")
