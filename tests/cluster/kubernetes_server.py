"""An HTTP server on loopback that behaves as a Kubernetes API server does, and misbehaves when it is told to.

Written from the API's documentation (each file of kubernetes/ says what from where): core/v1, batch/v1, Kueue's
objects, and custom resources of the definitions it is given, which it validates.

    with KubernetesServer(*sorted(Path("tests/cluster/schemas").glob("*.yaml"))) as server:
        client = Client(server.url, server.token)
        client.submit(...)
        server.put("pods", {"metadata": {"name": "head", "labels": {...}}, "spec": {...}, "status": {...}})
        server.patch("rayjobs", "mine", {"status": {"jobStatus": "RUNNING"}})
        server.log("head", "step 1", "step 2")
        server.throttle(2, retry_after_s=1)
        server.cut()
        assert [str(request) for request in server.requests] == [...]

Not here: TLS, protobuf, tables, strategic-merge and JSON patches, grace periods, quotas, admission by others.
"""

from __future__ import annotations

import contextlib
import copy
import re
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.cluster.kubernetes.api import Api
from tests.cluster.kubernetes.fields import Object, Owner
from tests.cluster.kubernetes.messages import Answer, Request, Stream, as_error
from tests.cluster.kubernetes.objects import BUILT_IN, ApiError, already_exists, conflict, custom_resource
from tests.cluster.kubernetes.reads import PodLog
from tests.cluster.kubernetes.store import Options, Store
from tests.http_proxy import Handler

_FAILURES = {
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "The server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted duration"),
}
_CONTROLLER = Owner("controller")


@dataclass
class _Fault:
    """For the next requests of a kind. answer: in place of the real one; carried_out: the request is, nevertheless."""

    left: int
    only: str
    answer: Callable[[Request], Answer] | None = None
    carried_out: bool = False
    ends: str = ""  # "stall", "reset", "truncate"


class KubernetesServer:
    """Use it in `with`. Objects are what JSON has; `namespace` of what belongs to none is ignored.

    `only`, where a method has it, is a regular expression searched in "METHOD path?query": which requests are meant.
    requests: what came, in order. delay_s: before each answer. token: what is asked for, may be changed.
    """

    def __init__(
        self,
        *definitions: Path,
        token: str = "the-token",
        user: str = "system:serviceaccount:default:shardyard",
        namespaces: tuple[str, ...] = ("default", "kube-system"),
        bookmark_every_s: float = 60.0,
    ) -> None:
        self.token = token
        self.delay_s = 0.0
        self.requests: list[Request] = []
        self.store = Store([*BUILT_IN, *map(custom_resource, definitions)])
        self.api = Api(self.store, user, bookmark_every_s)
        self.released, self.closed = threading.Event(), threading.Event()
        self._faults: list[_Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        for name in namespaces:
            self.put("namespaces", {"metadata": {"name": name}})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.closed.set()
        with self.store.changed:
            for stream in self.api.reads.streams:
                stream.ending = "cut"
            self.store.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # What controllers do: no request, no permission, but the same checks and the same events.

    def get(self, plural: str, name: str, namespace: str = "default") -> Object:
        """ApiError 404 where there is none."""
        return copy.deepcopy(self.store.get(self.store.resources[plural], self._namespace(plural, namespace), name))

    def objects(self, plural: str, namespace: str = "default") -> list[Object]:
        """By name."""
        of = self.store.resources[plural]
        return copy.deepcopy(self.store.snapshot(of, self._namespace(plural, namespace)))

    def put(self, plural: str, body: Object, namespace: str = "default") -> Object:
        """Create or replace it, with its status, by metadata.name; kind and apiVersion are filled in."""
        of, where = self.store.resources[plural], self._namespace(plural, namespace)
        body = copy.deepcopy(body) | {"kind": of.kind, "apiVersion": of.api_version}
        name = body["metadata"].get("name", "")
        body["metadata"].pop("resourceVersion", None)
        with self.store.changed:
            if any(found["metadata"]["name"] == name for found in self.store.snapshot(of, where)):
                body["metadata"]["resourceVersion"] = self.get(plural, name, namespace)["metadata"]["resourceVersion"]
                self.store.update(of, where, name, body, Options(owner=_CONTROLLER, unknown="Strict"))
            else:
                options = Options(owner=_CONTROLLER, unknown="Strict")
                name = self.store.create(of, where, body, options)["metadata"]["name"]
            return self.patch(plural, name, {"status": body["status"]} if "status" in body else {}, namespace)

    def patch(self, plural: str, name: str, patch: Object, namespace: str = "default") -> Object:
        """Merge that into it (null removes), also into its status."""
        of, where = self.store.resources[plural], self._namespace(plural, namespace)
        rest = {key: value for key, value in patch.items() if key != "status" or not of.has_status}
        with self.store.changed:
            if rest:
                options = Options(owner=_CONTROLLER, unknown="Strict")
                self.store.merge_patch(of, where, name, rest, options)
            if len(rest) < len(patch):
                options = Options(owner=Owner("controller", "Update", "status"), unknown="Strict")
                self.store.merge_patch(of, where, name, {"status": patch["status"]}, options)
            # A patch that takes the last finalizer away has removed the object.
            found = [one for one in self.objects(plural, namespace) if one["metadata"]["name"] == name]
            return found[0] if found else {}

    def delete(self, plural: str, name: str, namespace: str = "default", policy: str = "Background") -> None:
        """Finalizers keep it, as they do for clients."""
        of, where = self.store.resources[plural], self._namespace(plural, namespace)
        self.store.delete(of, where, name, {"propagationPolicy": policy})

    def log(
        self, pod: str, *lines: str, container: str = "", namespace: str = "default", at: datetime | None = None
    ) -> None:
        """Append to a container's log; container: the pod's first. at: with its zone; now."""
        with self.store.changed:
            log = self._log_of(pod, container, namespace)
            log.lines += [(at or datetime.now(UTC), line) for line in lines]
            self.store.changed.notify_all()

    def end_log(self, pod: str, container: str = "", namespace: str = "default") -> None:
        """The container has ended: who follows its log comes to an end."""
        with self.store.changed:
            self._log_of(pod, container, namespace).ended = True
            self.store.changed.notify_all()

    # What goes wrong.

    def expire(self, *, in_stream: bool = True) -> None:
        """Each revision seen so far is too old: open watches end with an ERROR event, and later ones meet 410.

        in_stream: those later ones as an ERROR event too (200), as a server's cache does it; else as the status.
        Returns when the open watches have ended.
        """
        with self.store.changed:
            self.api.reads.gone_in_stream = in_stream
            open_watches = [stream for stream in self.api.reads.streams if stream.watch]
            for stream in open_watches:
                stream.expired = True
            self.store.expire()
        self._wait_for_end(open_watches)

    def cut(self, *, clean: bool = False) -> None:
        """End all open watches and followed logs. clean: as a server does whose time is up, not in mid-air.

        What had happened before is sent before; returns when they have ended.
        """
        with self.store.changed:
            streams = list(self.api.reads.streams)
            for stream in streams:
                stream.ending = "clean" if clean else "cut"
            self.store.changed.notify_all()
        self._wait_for_end(streams)

    def bookmark(self) -> None:
        """Send one now to each open watch that asked for bookmarks."""
        with self.store.changed:
            for stream in self.api.reads.streams:
                stream.bookmark = stream.watch
            self.store.changed.notify_all()

    def throttle(self, count: int = 1, *, retry_after_s: int = 1, status: bool = False, only: str = "") -> None:
        """429, in plain text as API Priority and Fairness answers; status: with a Status, as an eviction is refused."""
        text = "Too many requests, please try again later."
        if status:
            error = ApiError(429, "TooManyRequests", text, {"retryAfterSeconds": retry_after_s})
            self._fault(_Fault(count, only, lambda _: as_error(error)))
        else:
            headers = {"Content-Type": "text/plain; charset=utf-8", "Retry-After": str(retry_after_s)}
            self._fault(_Fault(count, only, lambda _: Answer(429, f"{text}\n".encode(), headers)))

    def fail(
        self, count: int = 1, code: int = 503, *, carried_out: bool = False, html: bool = False, only: str = ""
    ) -> None:
        """500, 503 or 504. html: not the API server's, but that of a load balancer in front of it."""
        reason, text = _FAILURES[code]
        page = Answer(code, f"<html><body><h1>{code}</h1></body></html>".encode(), {"Content-Type": "text/html"})
        answer = page if html else as_error(ApiError(code, reason, text))
        self._fault(_Fault(count, only, lambda _: answer, carried_out))

    def refuse_write(self, reason: str, count: int = 1) -> None:
        """409 for the next POST, PUT or PATCH. reason: AlreadyExists or Conflict."""
        self._fault(_Fault(count, r"^(POST|PUT|PATCH) (?!/apis/authorization)", lambda it: self._refused(it, reason)))

    def stall(self, count: int = 1, *, carried_out: bool = False, only: str = "") -> None:
        """No answer; at `mend` the connection is reset."""
        self.released.clear()
        self._fault(_Fault(count, only, None, carried_out, "stall"))

    def reset(self, count: int = 1, *, carried_out: bool = False, only: str = "") -> None:
        """The connection is reset in place of an answer."""
        self._fault(_Fault(count, only, None, carried_out, "reset"))

    def truncate(self, count: int = 1, *, only: str = "") -> None:
        """The request is carried out; half of the answer's body comes. Not for streams: `cut`."""
        self._fault(_Fault(count, only, None, True, "truncate"))

    def mend(self) -> None:
        """No fault from now on, no delay; stalled requests are let go."""
        with self.store.changed:
            self._faults.clear()
            self.delay_s = 0.0
        self.released.set()

    def deny(self, verb: str, resource: str, namespace: str | None = None) -> None:
        """403. verb: as in RBAC (get, list, watch, create, ...) or "*"; resource: "pods", "pods/log", "*"."""
        self.api.denied.append((verb, resource, namespace))

    def allow_all(self) -> None:
        """Undo `deny`."""
        self.api.denied.clear()

    def uninstall(self, group: str) -> None:
        """No definitions of this group: its paths are not there."""
        self.api.absent.add(group)

    # What has happened.

    def wait_for_requests(self, only: str, count: int = 1, timeout_s: float = 10.0) -> list[Request]:
        """Return those that have come, when they are so many."""
        with self.store.changed:
            self.store.changed.wait_for(lambda: len(self._matching(only)) >= count, timeout_s)
            found = self._matching(only)
        assert len(found) >= count, f"{len(found)} requests like {only!r} have come, not {count}"
        return found

    def wait_for_streams(self, only: str = "", count: int = 1, timeout_s: float = 10.0) -> None:
        """Return when exactly so many watches and followed logs are open."""

        def number() -> int:
            return len([stream for stream in self.api.reads.streams if re.search(only, str(stream.request))])

        with self.store.changed:
            self.store.changed.wait_for(lambda: number() == count, timeout_s)
            assert number() == count, f"{number()} streams like {only!r} are open, not {count}"

    def respond(self, request: Request, authorization: str) -> tuple[Answer, str]:
        """For the handler: the answer, and how it ends otherwise than it should."""
        with self.store.changed:
            self.requests.append(request)
            self.store.changed.notify_all()
            fitting = [one for one in self._faults if one.left and re.search(one.only, str(request))]
            fault = fitting[0] if fitting else None
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or token != self.token:  # RFC 9110: schemes in either case
                return as_error(ApiError(401, "Unauthorized", "Unauthorized")), ""
            if fault:
                fault.left -= 1
        self.closed.wait(self.delay_s)
        if fault is None:
            return self.api.answer(request), ""
        real = self.api.answer(request) if fault.carried_out else Answer(200)
        return fault.answer(request) if fault.answer else real, fault.ends

    def _fault(self, fault: _Fault) -> None:
        with self.store.changed:
            self._faults.append(fault)

    def _refused(self, request: Request, reason: str) -> Answer:
        parts = request.path.split("/")
        plural = next(part for part in reversed(parts) if part in self.store.resources)
        name = request.json["metadata"].get("name", "") if request.method == "POST" else parts[parts.index(plural) + 1]
        of = self.store.resources[plural]
        return as_error({"AlreadyExists": already_exists, "Conflict": conflict}[reason](of, name))

    def _matching(self, only: str) -> list[Request]:
        return [request for request in self.requests if re.search(only, str(request))]

    def _namespace(self, plural: str, namespace: str) -> str:
        return namespace if self.store.resources[plural].namespaced else ""

    def _log_of(self, pod: str, container: str, namespace: str) -> PodLog:
        containers = self.get("pods", pod, namespace)["spec"]["containers"]
        return self.api.reads.logs.setdefault((namespace, pod, container or containers[0]["name"]), PodLog())

    def _wait_for_end(self, streams: list[Stream]) -> None:
        for stream in streams:
            assert stream.ended.wait(10), f"{stream.request} does not end: its client does not read"


class _Handler(Handler):
    owner: Any
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        authorization = headers.pop("authorization", "")
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        request = Request(self.command, unquote(url.path), query, headers, self.body())
        answer, ends = self.owner.respond(request, authorization)
        try:
            if ends == "stall":
                self.owner.released.wait()
            if ends in ("stall", "reset"):
                self.reset()
            else:
                self._send(answer, truncated=ends == "truncate")
        finally:
            if answer.stream:
                self.owner.api.reads.end(answer.stream)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _send(self, answer: Answer, *, truncated: bool) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        for warning in answer.warnings:
            quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
            self.send_header("Warning", f'299 - "{quoted}"')
        if answer.stream:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._send_pieces(answer, answer.stream)
            return
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[: len(answer.body) // 2] if truncated else answer.body)
        self.close_connection |= truncated

    def _send_pieces(self, answer: Answer, stream: Stream) -> None:
        for piece in answer.pieces:
            if piece:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            elif self._client_has_gone():
                self.close_connection = True
                return
        if stream.ending == "cut":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _client_has_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
