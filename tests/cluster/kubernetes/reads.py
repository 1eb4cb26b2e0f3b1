"""Lists, watches and logs of a Kubernetes API server.

After kubernetes.io, "Kubernetes API Concepts" (Efficient detection of changes, Watch bookmarks, Retrieving large
results sets in chunks, Resource versions), and the API reference (Pod: read log of the specified Pod).
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tests.cluster.kubernetes.fields import Object, Test, field_selector, label_selector
from tests.cluster.kubernetes.messages import JSON, TEXT, Answer, Request, Stream, Target, number
from tests.cluster.kubernetes.objects import ApiError, Resource, bad_request, invalid, invalid_option
from tests.cluster.kubernetes.schema import Cause, is_time
from tests.cluster.kubernetes.store import Change, Store

_TICK_S = 0.1  # a stream looks this often whether its client is still there
_EXPIRED_LIST = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without"
    " the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
    " Continuing with the provided token results in an inconsistent list - objects that were created, modified, or"
    " deleted between the time the first chunk was returned and now may show up in the list."
)


@dataclass
class PodLog:
    """Of a container."""

    lines: list[tuple[datetime, str]] = field(default_factory=list)
    ended: bool = False


class Reads:
    """gone_in_stream: a watch from a revision that is too old is answered with 200 and an ERROR event, as the server's
    cache does it; else with 410. The documentation allows both.
    """

    def __init__(self, store: Store, bookmark_every_s: float) -> None:
        self.store = store
        self.bookmark_every_s = bookmark_every_s
        self.gone_in_stream = True
        self.logs: dict[tuple[str, str, str], PodLog] = {}
        self.streams: list[Stream] = []

    def end(self, stream: Stream) -> None:
        """Its client has gone, or all is sent."""
        with self.store.changed:
            self.streams.remove(stream)
            stream.ended.set()
            self.store.changed.notify_all()

    def page(self, target: Target, query: dict[str, str]) -> Object:
        of, store = target.resource, self.store
        matches, limit, start = _matches(of, query), number(query, "limit") or 0, ("", "")
        with store.changed:
            if query.get("continue"):
                revision, start = self._continued(query)
            else:
                revision = self.asked_revision(query, limit)
            items = store.snapshot(of, target.namespace, revision)
        items = [item for item in items if matches(item) and _key(item) > start]
        page = items[:limit] if limit else items
        metadata: Object = {"resourceVersion": str(revision)}
        if len(page) < len(items):
            metadata["continue"] = _token(revision, _key(page[-1]))
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                metadata["remainingItemCount"] = len(items) - len(page)
        if not of.custom:  # the server's own kinds come without kind and apiVersion in lists
            page = [
                {name: value for name, value in item.items() if name not in ("kind", "apiVersion")} for item in page
            ]
        return {"kind": f"{of.kind}List", "apiVersion": of.api_version, "metadata": metadata, "items": page}

    def _continued(self, query: dict[str, str]) -> tuple[int, tuple[str, str]]:
        """The revision and the last key of a list of which a part was sent."""
        if query.get("resourceVersion", "0") not in ("", "0"):
            raise bad_request("specifying resource version is not allowed when using continue")
        try:
            revision, namespace, name = json.loads(base64.urlsafe_b64decode(query["continue"]))
        except ValueError as error:
            raise bad_request(f"continue key is not valid: {error}") from None
        if 0 <= revision < self.store.oldest:
            raise ApiError(410, "Expired", _EXPIRED_LIST, metadata={"continue": _token(-1, (namespace, name))})
        return self.store.revision if revision < 0 else revision, (namespace, name)

    def asked_revision(self, query: dict[str, str], limit: int = 0) -> int:
        """For get and list ("Resource versions"): the newest, unless the exact one is asked for."""
        text, match = query.get("resourceVersion", ""), query.get("resourceVersionMatch", "")
        if match and not text:
            message = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
            raise invalid_option("ListOptions", "resourceVersionMatch", message, "FieldValueForbidden")
        asked, newest = _revision(text), self.store.revision
        if asked > newest:
            causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
            text = f"Timeout: Too large resource version: {asked}, current: {newest}"
            raise ApiError(504, "Timeout", text, {"causes": causes, "retryAfterSeconds": 1})
        if match == "Exact" or (limit and asked and not match):
            if asked < self.store.oldest:
                raise ApiError(410, "Expired", "The resourceVersion for the provided list is too old.")
            return asked
        return newest

    def watch(self, target: Target, request: Request) -> Answer:
        query, store = request.query, self.store
        for name in ("sendInitialEvents", "resourceVersionMatch"):
            if query.get(name):
                text = f"Forbidden: {name} is forbidden for watch unless the WatchList feature gate is enabled"
                raise invalid_option("ListOptions", name, text, "FieldValueForbidden")
        matches, asked = _matches(target.resource, query), _revision(query.get("resourceVersion", ""))
        with store.changed:
            if 0 < asked < store.oldest:
                error = ApiError(410, "Expired", f"too old resource version: {asked} ({store.oldest})")
                if not self.gone_in_stream:
                    raise error
                return Answer(200, _event("ERROR", error.status()), JSON)
            stream = Stream(request, watch=True)
            self.streams.append(stream)
            first = [] if asked else store.snapshot(target.resource, target.namespace)
            lines = [_event("ADDED", item) for item in first if matches(item)]
            pieces = self._events(stream, target, matches, asked or store.revision, lines)
        return Answer(200, b"", JSON, stream=stream, pieces=pieces)

    def _events(self, stream: Stream, target: Target, matches: Test, after: int, lines: list[bytes]) -> Iterator[bytes]:
        """After those lines, what has changed after that revision, until the stream ends."""
        query, store, position = stream.request.query, self.store, 0
        deadline = time.monotonic() + (number(query, "timeoutSeconds") or 1800)
        next_bookmark = time.monotonic() + self.bookmark_every_s
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        yield from lines
        while True:
            with store.changed:
                news = functools.partial(self._is_news, stream, position)
                store.changed.wait_for(news, min(_TICK_S, max(0.0, deadline - time.monotonic())))
                changes, revision = store.changes[position:], store.revision
                position += len(changes)
                ending, expired, bookmark = stream.ending, stream.expired, stream.bookmark
                stream.bookmark = False
            for change in changes:
                if change.revision > after:
                    yield from _seen(change, target, matches)
            over = time.monotonic() >= deadline
            if expired:
                text = "The resourceVersion for the provided watch is too old."
                yield _event("ERROR", ApiError(410, "Expired", text).status())
                return
            if bookmarks and not ending and (bookmark or over or time.monotonic() >= next_bookmark):
                next_bookmark = time.monotonic() + self.bookmark_every_s
                metadata = {"resourceVersion": str(max(after, revision))}
                kind, version = target.resource.kind, target.resource.api_version
                yield _event("BOOKMARK", {"kind": kind, "apiVersion": version, "metadata": metadata})
            if over or ending:
                return
            yield b""

    def _is_news(self, stream: Stream, position: int) -> bool:
        return bool(len(self.store.changes) > position or stream.ending or stream.expired or stream.bookmark)

    def log(self, target: Target, request: Request) -> Answer:
        """text/plain; with the parameters of "read log of the specified Pod"."""
        query, store, name = request.query, self.store, target.name
        with store.changed:
            pod = store.get(target.resource, target.namespace, name)
            container = _container(pod, query.get("container", ""))
            log = self.logs.get((target.namespace, name, container))
            if query.get("previous") == "true":
                raise bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
            if log is None and not pod["spec"].get("nodeName"):
                return Answer(204)
            for state in pod.get("status", {}).get("containerStatuses", []):
                if state["name"] == container and "waiting" in state.get("state", {}):
                    why = state["state"]["waiting"].get("reason", "ContainerCreating")
                    raise bad_request(f'container "{container}" in pod "{name}" is waiting to start: {why}')
            log = log or self.logs.setdefault((target.namespace, name, container), PodLog())
            first = _first_line(log, query)
            if query.get("follow") != "true":
                text = b"".join(_lines(log, first, query))
                return Answer(200, text[: number(query, "limitBytes")], TEXT)
            stream = Stream(request, watch=False)
            self.streams.append(stream)
        return Answer(200, b"", TEXT, stream=stream, pieces=self._followed(stream, target, log, first))

    def _followed(self, stream: Stream, target: Target, log: PodLog, position: int) -> Iterator[bytes]:
        """Until the container has ended or its pod is gone."""
        store, ended = self.store, False
        while not ended:
            with store.changed:
                news = functools.partial(self._is_said, stream, log, position)
                store.changed.wait_for(news, _TICK_S)
                lines = list(_lines(log, position, stream.request.query))
                position += len(lines)
                pods = [pod["metadata"]["name"] for pod in store.snapshot(target.resource, target.namespace)]
                ended = bool(log.ended or stream.ending or target.name not in pods)
            yield from lines
            yield b""

    def _is_said(self, stream: Stream, log: PodLog, position: int) -> bool:
        return bool(len(log.lines) > position or log.ended or stream.ending)


def _matches(of: Resource, query: dict[str, str]) -> Test:
    try:
        by_label = label_selector(query.get("labelSelector", ""))
        by_field = field_selector(query.get("fieldSelector", ""), of.fields)
    except ValueError as error:
        raise bad_request(str(error)) from None
    return lambda obj: by_label(obj) and by_field(obj)


def _revision(text: str) -> int:
    if text and not text.isdecimal():
        raise bad_request(f'invalid resource version: resourceVersion: Invalid value: "{text}"')
    return int(text or 0)


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _token(revision: int, key: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([revision, *key]).encode()).decode()


def _event(kind: str, obj: Object) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def _seen(change: Change, target: Target, matches: Test) -> Iterator[bytes]:
    """As a watch with selectors sees it: an object comes and goes also when it begins and ceases to match."""
    if change.resource != target.resource or target.namespace not in ("", change.namespace):
        return
    was = change.old is not None and matches(change.old)
    if change.new is not None and matches(change.new):
        yield _event("MODIFIED" if was else "ADDED", change.new)
    elif change.old is not None and was:
        last = change.sent if change.new is None else change.old
        version = {"resourceVersion": str(change.revision)}
        yield _event("DELETED", last | {"metadata": last["metadata"] | version})


def _container(pod: Object, asked: str) -> str:
    name, spec = pod["metadata"]["name"], pod["spec"]
    names, first = ([one["name"] for one in spec.get(key, [])] for key in ("containers", "initContainers"))
    if not asked and len(names) == 1:
        return str(names[0])
    if not asked:
        more = f" or one of the init containers: [{' '.join(first)}]" if first else ""
        text = f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]{more}"
        raise bad_request(text)
    if asked not in names + first:
        raise bad_request(f"container {asked} is not valid for pod {name}")
    return asked


def _first_line(log: PodLog, query: dict[str, str]) -> int:
    """Of those asked for. A time is cut to whole seconds on its way to the node."""
    if query.get("sinceTime") and query.get("sinceSeconds"):
        cause = Cause(
            "", "FieldValueForbidden", "Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified"
        )
        raise invalid("", "PodLogOptions", "", [cause])
    since = datetime.min.replace(tzinfo=UTC)
    if query.get("sinceTime"):
        if not is_time(query["sinceTime"]):
            raise bad_request(f'parsing time "{query["sinceTime"]}" as "2006-01-02T15:04:05Z07:00": cannot parse')
        since = datetime.fromisoformat(query["sinceTime"]).replace(microsecond=0)
    elif query.get("sinceSeconds"):
        since = datetime.now(UTC) - timedelta(seconds=number(query, "sinceSeconds") or 0)
    tail = number(query, "tailLines")
    first = 0 if tail is None else max(0, len(log.lines) - tail)
    while first < len(log.lines) and log.lines[first][0] < since:
        first += 1
    return first


def _lines(log: PodLog, first: int, query: dict[str, str]) -> Iterator[bytes]:
    for at, text in log.lines[first:]:
        stamp = at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z ") if query.get("timestamps") == "true" else ""
        yield f"{stamp}{text}\n".encode()
