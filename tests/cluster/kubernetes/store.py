"""The objects of a Kubernetes API server: writes, deletions, and every change in order.

After kubernetes.io: "Kubernetes API Concepts" (Resource versions, Dry-run, Resource deletion), "Server-Side Apply",
"Finalizers", "Garbage Collection", "Namespaces".
"""

from __future__ import annotations

import copy
import random
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.cluster.kubernetes.fields import (
    ApplyConflictError,
    Object,
    Owner,
    Owners,
    apply,
    managed_fields,
    merge,
    owners_of,
    update_owners,
)
from tests.cluster.kubernetes.objects import (
    ApiError,
    Decoding,
    Resource,
    admit,
    already_exists,
    bad_request,
    conflict,
    invalid,
    not_found,
    now,
    readable,
)
from tests.cluster.kubernetes.schema import Cause

_FIRST_STATUS = {"pods": "Pending", "namespaces": "Active", "persistentvolumeclaims": "Pending"}
# A deletion answers with these, with a Status for others.
_ANSWERED = ("namespaces", "pods", "persistentvolumeclaims", "resourcequotas")
# Of a write that is not a create, what the server keeps.
_KEPT = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields")


@dataclass(kw_only=True)
class Options(Decoding):
    """Of a write."""

    owner: Owner
    dry_run: bool = False


@dataclass(frozen=True)
class Change:
    """A write. new: None for a deletion, of which `sent` is the last state with the deletion's own revision."""

    revision: int
    resource: Resource
    namespace: str
    name: str
    old: Object | None
    new: Object | None
    sent: Object


class Store:
    """changed: held during each write, and notified of it. An object that is stored is never altered again."""

    def __init__(self, resources: Iterable[Resource]) -> None:
        self.resources = {known.plural: known for known in resources}
        self.changed = threading.Condition(threading.RLock())
        self.changes: list[Change] = []
        self.revision = 1000
        self.oldest = 0  # of the revisions that can still be asked for
        self._objects: dict[tuple[str, str, str], Object] = {}

    def get(self, of: Resource, namespace: str, name: str) -> Object:
        try:
            return self._objects[of.plural, namespace, name]
        except KeyError:
            raise not_found(of, name) from None

    def snapshot(self, of: Resource, namespace: str, revision: int | None = None) -> list[Object]:
        """All, by namespace and name; namespace: "" for every. revision: as they were then."""
        with self.changed:
            found: dict[tuple[str, str], Object] = {}
            for change in self.changes:
                if change.resource == of and change.revision <= (self.revision if revision is None else revision):
                    found.pop((change.namespace, change.name), None)
                    if change.new is not None and namespace in ("", change.namespace):
                        found[change.namespace, change.name] = change.new
            return [found[key] for key in sorted(found)]

    def create(
        self, of: Resource, namespace: str, body: Object, options: Options, owners: Owners | None = None
    ) -> Object:
        """owners: of the fields, if they are known otherwise than by what is there."""
        new = readable(of, namespace, "", body)
        metadata = new["metadata"]
        if metadata.pop("resourceVersion", ""):
            raise ApiError(500, "", "resourceVersion should not be set on objects to be created")
        with self.changed:
            if of.namespaced and ("namespaces", "", namespace) not in self._objects:
                raise not_found(self.resources["namespaces"], namespace)
            if not metadata.get("name") and metadata.get("generateName"):
                metadata["name"] = self._generated(of, namespace, metadata["generateName"])
            name = metadata.get("name", "")
            for kept in _KEPT:
                metadata.pop(kept, None)
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
            if of.has_status:
                metadata["generation"] = 1
                new.pop("status", None)
            if of.plural in _FIRST_STATUS:
                new["status"] = {"phase": _FIRST_STATUS[of.plural]}
            admit(of, new, None, options)
            if (of.plural, namespace, name) in self._objects:
                raise already_exists(of, name)
            self._own(of, {"metadata": {}}, new, options, owners)
            return self._commit(of, namespace, name, new, options)

    def update(self, of: Resource, namespace: str, name: str, body: Object, options: Options) -> Object:
        """PUT: the object is replaced; with the version it was read at, if it holds one."""
        with self.changed:
            old = self.get(of, namespace, name)
            new = readable(of, namespace, name, body)
            if of.custom and not new["metadata"].get("resourceVersion"):
                text = "Invalid value: 0x0: must be specified for an update"
                cause = Cause("metadata.resourceVersion", "FieldValueInvalid", text)
                raise invalid(of.group, of.plural, name, [cause])
            return self._write(of, old, new, options)

    def merge_patch(self, of: Resource, namespace: str, name: str, patch: Object, options: Options) -> Object:
        """PATCH with application/merge-patch+json."""
        with self.changed:
            old = self.get(of, namespace, name)
            return self._write(of, old, readable(of, namespace, name, merge(old, patch)), options)

    def apply(
        self, of: Resource, namespace: str, name: str, config: Object, options: Options, *, force: bool
    ) -> tuple[Object, bool]:
        """PATCH with application/apply-patch+yaml; also whether the object is new."""
        config = readable(of, namespace, name, config)
        if config["metadata"].get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        with self.changed:
            old = self._objects.get((of.plural, namespace, name))
            empty = {"apiVersion": of.api_version, "kind": of.kind, "metadata": {}}
            try:
                new, owners = apply(old or empty, config, options.owner, force=force)
            except ApplyConflictError as error:
                causes = [
                    {"reason": "FieldManagerConflict", "message": message, "field": path}
                    for message, path in error.causes
                ]
                raise ApiError(409, "Conflict", str(error), {"causes": causes}) from None
            if old is None:
                return self.create(of, namespace, new, options, owners), True
            return self._write(of, old, new, options, owners), False

    def delete(self, of: Resource, namespace: str, name: str, body: Object, *, dry_run: bool = False) -> Object | None:
        """body: DeleteOptions. The object, where finalizers keep it or its kind has it so; None: it is gone."""
        policy = body.get("propagationPolicy") or ("Orphan" if of.plural == "jobs" else "Background")
        with self.changed:
            old = self.get(of, namespace, name)
            self._check_preconditions(of, old, body.get("preconditions") or {})
            if "deletionTimestamp" in old["metadata"]:
                return old
            waits = [*old["metadata"].get("finalizers", ()), *["foregroundDeletion"] * (policy == "Foreground")]
            if dry_run:
                return old if waits or of.plural in _ANSWERED else None
            if policy == "Orphan":
                self._let_go(old["metadata"]["uid"])
            if not waits:
                sent = self._remove(of, old)
                return sent if of.plural in _ANSWERED else None
            new = copy.deepcopy(old)
            new["metadata"] |= {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 0, "finalizers": waits}
            new = self._commit(of, namespace, name, new, _SYSTEM)
            if policy == "Foreground":
                self._delete_dependents(old["metadata"]["uid"], policy)
                self._finish_deletions()
            return new

    def expire(self) -> None:
        """Forget what was before now: every revision that anybody has seen is too old."""
        with self.changed:
            self.revision += 1
            self.oldest = self.revision
            self.changed.notify_all()

    def _generated(self, of: Resource, namespace: str, prefix: str) -> str:
        while True:
            name = prefix[:58] + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
            if (of.plural, namespace, name) not in self._objects:
                return name

    def _write(self, of: Resource, old: Object, new: Object, options: Options, owners: Owners | None = None) -> Object:
        """What all writes to an object that exists have in common."""
        before, name = old["metadata"], old["metadata"]["name"]
        if (new["metadata"].get("resourceVersion") or before["resourceVersion"]) != before["resourceVersion"]:
            raise conflict(of, name)
        self._check_preconditions(of, old, {"uid": new["metadata"].get("uid")})
        if options.owner.subresource == "status":
            new = old | {"status": new.get("status")}
            new = copy.deepcopy({key: value for key, value in new.items() if value is not None})
        elif of.has_status:
            new.pop("status", None)
            new |= {"status": old["status"]} if "status" in old else {}
        metadata = {key: value for key, value in new["metadata"].items() if key not in _KEPT}
        kept = {key: before[key] for key in _KEPT if key in before}
        new["metadata"] = metadata | kept | {"resourceVersion": before["resourceVersion"]}
        admit(of, new, old, options)
        if "generation" in before and _without(new, "status", "metadata") != _without(old, "status", "metadata"):
            new["metadata"]["generation"] += 1
        self._own(of, old, new, options, owners)
        if "deletionTimestamp" in before and not metadata.get("finalizers"):
            if not options.dry_run:
                self._remove(of, new)
            return new
        if new == old:
            return old
        return self._commit(of, before.get("namespace", ""), name, new, options)

    def _own(self, of: Resource, old: Object, new: Object, options: Options, owners: Owners | None) -> None:
        """Write down who owns which field."""
        found = update_owners(old, new, options.owner) if owners is None else owners
        if found != owners_of(old):
            entries = managed_fields(found, old["metadata"].get("managedFields", []), of.api_version, now())
            new["metadata"]["managedFields"] = entries

    def _commit(self, of: Resource, namespace: str, name: str, new: Object, options: Options) -> Object:
        if not options.dry_run:
            self.revision += 1
            new["metadata"]["resourceVersion"] = str(self.revision)
            old = self._objects.get((of.plural, namespace, name))
            self._objects[of.plural, namespace, name] = new
            self.changes.append(Change(self.revision, of, namespace, name, old, new, new))
            self.changed.notify_all()
        return new

    def _remove(self, of: Resource, last: Object) -> Object:
        """For good; the last state. Then what belongs to it ("Garbage Collection", "Namespaces")."""
        self.revision += 1
        metadata = last["metadata"]
        key = (of.plural, metadata.get("namespace", ""), metadata["name"])
        old = self._objects.pop(key)
        sent = last | {"metadata": metadata | {"resourceVersion": str(self.revision)}}
        self.changes.append(Change(self.revision, of, *key[1:], old, None, sent))
        self.changed.notify_all()
        if of.plural == "namespaces":
            for plural, namespace, name in list(self._objects):
                if namespace == metadata["name"] and (plural, namespace, name) in self._objects:
                    self._remove(self.resources[plural], self._objects[plural, namespace, name])
        self._delete_dependents(metadata["uid"], "Background")
        self._finish_deletions()
        return sent

    def _delete_dependents(self, uid: str, policy: str) -> None:
        """Unless another owner of theirs is there."""
        present = {found["metadata"]["uid"] for found in self._objects.values()} - {uid}
        for of, dependent in self._dependents(uid):
            metadata = dependent["metadata"]
            key = (of.plural, metadata.get("namespace", ""), metadata["name"])
            if key in self._objects and not present & {owner.get("uid") for owner in metadata["ownerReferences"]}:
                self.delete(of, *key[1:], {"propagationPolicy": policy})

    def _dependents(self, uid: str) -> Iterator[tuple[Resource, Object]]:
        for (plural, _, _), found in list(self._objects.items()):
            if any(owner.get("uid") == uid for owner in found["metadata"].get("ownerReferences", ())):
                yield self.resources[plural], found

    def _let_go(self, uid: str) -> None:
        """Its dependents stay, as nobody's."""
        for of, dependent in self._dependents(uid):
            new = copy.deepcopy(dependent)
            others = [owner for owner in new["metadata"]["ownerReferences"] if owner.get("uid") != uid]
            new["metadata"] |= {"ownerReferences": others}
            self._commit(of, new["metadata"].get("namespace", ""), new["metadata"]["name"], new, _SYSTEM)

    def _finish_deletions(self) -> None:
        """An owner deleted in the foreground goes when the last dependent that blocks it has gone."""
        for key, found in list(self._objects.items()):
            uid, finalizers = found["metadata"]["uid"], found["metadata"].get("finalizers", [])
            blocked = any(
                owner.get("uid") == uid and owner.get("blockOwnerDeletion")
                for _, dependent in self._dependents(uid)
                for owner in dependent["metadata"]["ownerReferences"]
            )
            if "foregroundDeletion" in finalizers and not blocked and self._objects.get(key) is found:
                new = copy.deepcopy(found)
                new["metadata"]["finalizers"].remove("foregroundDeletion")
                self._write(self.resources[key[0]], found, new, _SYSTEM)

    def _check_preconditions(self, of: Resource, old: Object, wanted: Object) -> None:
        metadata = old["metadata"]
        if wanted.get("uid") not in (None, "", metadata["uid"]):
            why = f"UID in precondition: {wanted['uid']}, UID in object meta: {metadata['uid']}"
            raise conflict(of, metadata["name"], f"Precondition failed: {why}")
        if wanted.get("resourceVersion") not in (None, "", metadata["resourceVersion"]):
            why = f"the ResourceVersion in the precondition ({wanted['resourceVersion']}) does not match the"
            why += f" ResourceVersion in record ({metadata['resourceVersion']}). The object might have been modified"
            raise conflict(of, metadata["name"], why)


_SYSTEM = Options(owner=Owner("kube-controller-manager"), unknown="Ignore")


def _without(obj: Object, *names: str) -> Object:
    return {key: value for key, value in obj.items() if key not in names}
