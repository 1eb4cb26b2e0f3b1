"""From a request to a Kubernetes API server to its answer; no sockets here.

After kubernetes.io, "Kubernetes API Concepts" (HTTP verbs, Dry-run, Field validation), "Server-Side Apply",
"Authorization Overview", "The Kubernetes API" (Discovery API).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from tests.cluster.kubernetes.fields import Object, Owner
from tests.cluster.kubernetes.messages import TEXT, Answer, Request, Target, as_error, as_json
from tests.cluster.kubernetes.objects import (
    ApiError,
    Resource,
    bad_request,
    details,
    invalid,
    invalid_option,
    unrecognized,
)
from tests.cluster.kubernetes.reads import Reads
from tests.cluster.kubernetes.schema import Cause
from tests.cluster.kubernetes.store import Options, Store

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}
_APPLY, _MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
_LARGEST_BODY = 3 * 1024**2
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_JOBS_WARNING = (
    "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set"
    " propagationPolicy=Orphan to suppress this warning"
)


class Api:
    """denied: (verb, resource or resource/subresource, namespace); "*" and None stand for any. absent: groups."""

    def __init__(self, store: Store, user: str, bookmark_every_s: float) -> None:
        self.store = store
        self.user = user
        self.reads = Reads(store, bookmark_every_s)
        self.denied: list[tuple[str, str, str | None]] = []
        self.absent: set[str] = set()

    def answer(self, request: Request) -> Answer:
        try:
            if len(request.body) > _LARGEST_BODY:
                text = f"Request entity too large: limit is {_LARGEST_BODY}"
                raise ApiError(413, "RequestEntityTooLarge", text)
            if request.path == _REVIEWS and request.method == "POST":
                return self._review(request)
            found = self._discovery(request.path)
            if found is not None:
                return as_json(200, found)
            if request.path in ("/healthz", "/livez", "/readyz"):
                return Answer(200, b"ok", TEXT)
            target = self._target(request.path)
            if target is None:
                return Answer(404, b"404 page not found\n", TEXT)
            return self._serve(target, request)
        except ApiError as error:
            return as_error(error)

    def allows(self, verb: str, resource: str, namespace: str) -> bool:
        """resource: also with a subresource."""
        return not any(
            verbs in ("*", verb) and resources in ("*", resource) and namespaces in (None, namespace)
            for verbs, resources, namespaces in self.denied
        )

    def _target(self, path: str) -> Target | None:
        parts = path.strip("/").split("/")
        root, rest = parts[: 2 if parts[0] == "api" else 3], parts[2 if parts[0] == "api" else 3 :]
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces" and rest[2] != "status":
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource, *more = [*rest, "", "", ""][: max(3, len(rest))]
        of = self.store.resources.get(plural)
        if of is None or more or of.group in self.absent or "/".join(root) != of.root:
            return None
        known = {"": True, "status": of.has_status, "log": plural == "pods"}
        if not known.get(subresource) or (namespace and not of.namespaced):
            return None
        return Target(of, namespace, name, subresource)

    def _serve(self, target: Target, request: Request) -> Answer:
        of, verb = target.resource, _verb(target, request)
        everywhere = of.namespaced and not target.namespace
        if not verb or (everywhere and (target.name or request.method != "GET")):
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        self._authorize(verb, target)
        if verb == "watch":
            return self.reads.watch(target, request)
        if verb == "list":
            return as_json(200, self.reads.page(target, request.query))
        if verb == "get" and target.subresource == "log":
            return self.reads.log(target, request)
        if verb == "get":
            self.reads.asked_revision(request.query)
            return as_json(200, self.store.get(of, target.namespace, target.name))
        if verb in ("delete", "deletecollection"):
            return self._delete(target, request)
        return self._write(verb, target, request)

    def _authorize(self, verb: str, target: Target) -> None:
        of = target.resource
        full = f"{of.plural}/{target.subresource}" if target.subresource else of.plural
        if not self.allows(verb, full, target.namespace):
            name = f' "{target.name}"' if target.name else ""
            where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
            text = f'{of.qualified}{name} is forbidden: User "{self.user}" cannot {verb} resource "{full}"'
            text += f' in API group "{of.group}" {where}'
            raise ApiError(403, "Forbidden", text, details(of, target.name))

    def _write(self, verb: str, target: Target, request: Request) -> Answer:
        of, namespace, name, store = target.resource, target.namespace, target.name, self.store
        media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        allowed = (_MERGE, _APPLY) if verb == "patch" else ("application/json", "application/yaml")
        if media not in allowed:
            text = "the body of the request was in an unknown format - accepted media types include: "
            raise ApiError(415, "UnsupportedMediaType", text + ", ".join(allowed))
        options = _options(verb, target, request, applies=media == _APPLY)
        body, options.repeated = _read(of.kind, request.body, yaml_too=media.endswith("yaml"))
        status = 200
        if verb == "create":
            status, found = 201, store.create(of, namespace, body, options)
        elif verb == "update":
            found = store.update(of, namespace, name, body, options)
        elif media == _MERGE:
            found = store.merge_patch(of, namespace, name, body, options)
        else:
            if all(found["metadata"]["name"] != name for found in store.snapshot(of, namespace)):
                self._authorize("create", target)
            force = request.query.get("force") == "true"
            found, is_new = store.apply(of, namespace, name, body, options, force=force)
            status = 201 if is_new else 200
        return as_json(status, found, options.warnings)

    def _delete(self, target: Target, request: Request) -> Answer:
        of, namespace, query = target.resource, target.namespace, request.query
        body = _read(of.kind, request.body)[0] if request.body else {}
        body |= {"propagationPolicy": query["propagationPolicy"]} if "propagationPolicy" in query else {}
        policy = body.get("propagationPolicy")
        if policy not in (None, "Foreground", "Background", "Orphan"):
            text = f'Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"'
            raise invalid_option("DeleteOptions", "propagationPolicy", text, "FieldValueNotSupported")
        dry_run = _dry_run(query | ({"dryRun": body["dryRun"][0]} if body.get("dryRun") else {}), "DeleteOptions")
        warnings = [_JOBS_WARNING] if of.plural == "jobs" and policy is None else []
        if not target.name:
            found = self.reads.page(target, query)
            for item in found["items"]:
                self.store.delete(of, namespace, item["metadata"]["name"], body, dry_run=dry_run)
            return as_json(200, found, warnings)
        with self.store.changed:
            uid = self.store.get(of, namespace, target.name)["metadata"]["uid"]
            kept = self.store.delete(of, namespace, target.name, body, dry_run=dry_run)
        gone = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return as_json(200, kept or gone | {"details": details(of, target.name, uid=uid)}, warnings)

    def _review(self, request: Request) -> Answer:
        """SelfSubjectAccessReview ("Authorization Overview", Checking API access)."""
        body, _ = _read("SelfSubjectAccessReview", request.body)
        wanted = body.get("spec", {}).get("resourceAttributes")
        if not wanted:
            text = "Invalid value: null: exactly one of nonResourceAttributes or resourceAttributes must be specified"
            cause = Cause("spec.resourceAttributes", "FieldValueInvalid", text)
            raise invalid("authorization.k8s.io", "SelfSubjectAccessReview", "", [cause])
        resource = "/".join(filter(None, (wanted.get("resource"), wanted.get("subresource"))))
        allowed = self.allows(wanted.get("verb", ""), resource, wanted.get("namespace", ""))
        return as_json(201, body | {"status": {"allowed": allowed}})

    def _discovery(self, path: str) -> Object | None:
        """/version, and what there is ("The Kubernetes API", Discovery API)."""
        groups = {"authorization.k8s.io": _group("authorization.k8s.io", "authorization.k8s.io/v1")}
        resources: dict[str, Object] = {}
        for of in self.store.resources.values():
            if of.group not in self.absent:
                empty = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": of.api_version, "resources": []}
                resources.setdefault(f"/{of.root}", empty)["resources"] += _discovered(of)
                if of.group:
                    groups[of.group] = _group(of.group, of.api_version)
        found: dict[str, Object] = {
            "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.4", "platform": "linux/amd64"},
            "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(groups.values())},
            **{f"/apis/{name}": {"kind": "APIGroup", "apiVersion": "v1", **group} for name, group in groups.items()},
            **resources,
        }
        return found.get(path)


def _verb(target: Target, request: Request) -> str:
    """As authorization has it; "" where the method does not fit."""
    name, subresource, method = target.name, target.subresource, request.method
    if method == "GET":
        return "get" if name else "watch" if request.query.get("watch") in ("true", "1") else "list"
    if subresource == "log" or (subresource and method in ("POST", "DELETE")):
        return ""
    if method == "DELETE":
        return "delete" if name else "deletecollection"
    return _VERBS[method] if bool(name) != (method == "POST") else ""


def _options(verb: str, target: Target, request: Request, *, applies: bool) -> Options:
    query, kind = request.query, f"{verb.capitalize()}Options"
    manager = query.get("fieldManager", "")
    if applies and not manager:
        raise invalid_option(kind, "fieldManager", "Required value: is required for apply patch", "FieldValueRequired")
    unknown = query.get("fieldValidation") or "Warn"
    if unknown not in ("Ignore", "Warn", "Strict"):
        text = f'Unsupported value: "{unknown}": supported values: "Ignore", "Warn", "Strict"'
        raise invalid_option(kind, "fieldValidation", text, "FieldValueNotSupported")
    manager = manager or request.headers.get("user-agent", "unknown").partition("/")[0]
    owner = Owner(manager, "Apply" if applies else "Update", target.subresource)
    return Options(owner=owner, dry_run=_dry_run(query, kind), unknown=unknown)


def _dry_run(query: dict[str, str], kind: str) -> bool:
    value = query.get("dryRun", "")
    if value not in ("", "All"):
        text = f'Unsupported value: "{value}": supported values: "All"'
        raise invalid_option(kind, "dryRun", text, "FieldValueNotSupported")
    return bool(value)


def _read(kind: str, body: bytes, *, yaml_too: bool = False) -> tuple[Object, list[str]]:
    """The object, and the paths of the fields that stand in it twice."""
    repeated: list[tuple[Object, list[str]]] = []

    def once(pairs: list[tuple[str, Any]]) -> Object:
        made = dict(pairs)
        names = [name for name, _ in pairs]
        repeated.append((made, [name for name in made if names.count(name) > 1]))
        return made

    try:
        found = yaml.safe_load(body) if yaml_too else json.loads(body, object_pairs_hook=once)
    except ValueError as error:
        raise unrecognized(kind, f"couldn't get version/kind; json parse error: {error}") from None
    except yaml.YAMLError as error:
        raise bad_request(f"error decoding YAML: {error}") from None
    if not isinstance(found, dict):
        raise unrecognized(kind, "couldn't get version/kind; json parse error: it is no object")
    twice = {id(made): names for made, names in repeated if names}
    return found, list(_repeated_paths(found, twice, "")) if twice else []


def _repeated_paths(value: Any, twice: dict[int, list[str]], path: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{path}{name}" for name in twice.get(id(value), ()))
        for name, inner in value.items():
            yield from _repeated_paths(inner, twice, f"{path}{name}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _repeated_paths(inner, twice, f"{path[:-1]}[{index}].")


def _group(name: str, version: str) -> Object:
    short = {"groupVersion": version, "version": version.partition("/")[2]}
    return {"name": name, "versions": [short], "preferredVersion": short}


def _discovered(of: Resource) -> Iterator[Object]:
    more = ["status"] * of.has_status + ["log"] * (of.plural == "pods")
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    whole = {"singularName": of.kind.lower(), "namespaced": of.namespaced, "kind": of.kind}
    yield {"name": of.plural, "verbs": verbs} | whole
    for name in more:
        own = ["get"] if name == "log" else ["get", "patch", "update"]
        yield {"name": f"{of.plural}/{name}", "verbs": own} | whole
