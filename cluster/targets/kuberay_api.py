"""A Kubernetes API server, asked as kubectl asks it: objects in, objects out, errors with their remedy.

Credentials are those that the package `kubernetes` obtains (kuberay_login.py). Requests are few and small: lists are
read whole, and nothing is watched.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from cluster.targets.kuberay_login import connect, credentials
from configs.errors import Unreachable, UsageError

# For an answer, with what is tried again: a request of a person who waits.
ANSWER_S = 8.0
_PASSING = (429, 500, 502, 503, 504)
_RETRY_S = 1.0
_TRIES = 3  # where connections break
Object = dict[str, Any]


class Taken(Exception):
    """An object of this name is there already."""


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str
    retry_after_s: float = _RETRY_S

    @property
    def object(self) -> Object:
        """{} where it is none."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) and found.get("kind") else {}

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed soon. A create meets a conflict where it counts against a quota."""
        conflict = self.status == 409 and self.object.get("reason") == "Conflict"
        return self.status in _PASSING or conflict

    @property
    def message(self) -> str:
        """What it says, in a line; a load balancer says it in HTML."""
        text = self.object.get("message") or re.sub(r"<[^>]*>", " ", self.text)
        return " ".join(text.split())[:1000] or "no reason is given"


class Api:
    """With the credentials of the kubeconfig, or of the pod it runs in."""

    def __init__(self, context: str | None) -> None:
        self._context = context
        self._client: Any = None

    def get(self, path: str) -> Object | None:
        """The object there; None without one."""
        answer = self._ask("GET", path)
        if answer.status == 404:
            self._absent(path, answer)
            return None
        return self._read(answer)

    def items(self, path: str, **selectors: str) -> list[Object]:
        """A list's, whole. selectors: labelSelector, fieldSelector."""
        answer = self._ask("GET", path, query=selectors)
        if answer.status == 404:
            self._absent(path, answer)
            return []
        found: list[Object] = self._read(answer).get("items") or []
        return found

    def create(self, path: str, body: Object) -> None:
        """Raises Taken: also where an answer was lost, and the object is the one that was sent."""
        answer = self._ask("POST", path, query={"fieldValidation": "Strict"}, body=body)
        if answer.status == 404:
            self._absent(path, answer)
            raise UsageError(f"{self._name()} refuses the job: {answer.message}. `kubectl get namespaces` lists them.")
        self._read(answer)

    def delete(self, path: str, uid: str | None = None) -> None:
        """With all that belongs to it, which goes first; what is not there is deleted already.

        uid: of the object that is meant; another one of its name is left alone.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
        options |= {"preconditions": {"uid": uid}} if uid else {}
        answer = self._ask("DELETE", path, body=options, allowed=(409,))
        if answer.status == 404:
            self._absent(path, answer)
        else:
            self._read(answer)

    def log(self, path: str, container: str) -> str:
        """Of a container; "" where it has none."""
        answer = self._ask("GET", f"{path}/log", query={"container": container}, allowed=(400,))
        return answer.text if answer.status == 200 else ""

    def group_version(self, group: str) -> str | None:
        """The version of a group of the API, as group/version; None where the server has no such group."""
        answer = self._ask("GET", f"/apis/{group}")
        if answer.status == 404:
            return None
        version: str = self._read(answer)["preferredVersion"]["groupVersion"]
        return version

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Object | None = None,
        allowed: tuple[int, ...] = (),
    ) -> _Answer:
        """The answer, unless it is a refusal that is neither 404 nor allowed."""
        deadline, renewed = time.monotonic() + ANSWER_S, False
        where = f"{path}?{urlencode(query)}" if query else path
        while True:
            self._client = self._client or connect(self._context)
            answer = self._send(method, where, body, deadline)
            if answer.status == 401 and not renewed:
                self._client, renewed = None, True  # a token may have been renewed meanwhile
                continue
            if answer.status < 400 or answer.status == 404 or answer.status in allowed:
                return answer
            if not answer.passes or time.monotonic() + answer.retry_after_s > deadline:
                raise self._refusal(answer)
            time.sleep(answer.retry_after_s)

    def _send(self, method: str, where: str, body: Object | None, deadline: float) -> _Answer:
        """Again where the connection breaks. An answer that is lost may have been a success."""
        import urllib3
        from kubernetes.client import ApiException

        tries = 0
        while True:
            tries += 1
            headers = {"Accept": "application/json", "Content-Type": "application/json"}
            headers |= credentials(self._client, self._context)
            left_s = max(deadline - time.monotonic(), 0.1)
            try:
                url = self._client.configuration.host + where
                response = self._client.call_api(method, url, headers, body=body, _request_timeout=left_s)
                content = response.read()
            except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
                if tries == _TRIES or not isinstance(error, urllib3.exceptions.ProtocolError):
                    raise self._silence(error) from error
                time.sleep(_RETRY_S)
                continue
            after = response.headers.get("Retry-After", "")
            wait_s = float(after) if after.isdecimal() else _RETRY_S
            return _Answer(response.status, content.decode(errors="replace"), wait_s)

    def _read(self, answer: _Answer) -> Object:
        if not answer.object:
            raise Unreachable(
                f"{self._name()} does not answer as a Kubernetes API server: {answer.message[:200]} Is the server's "
                "address in the kubeconfig right, and is there a proxy or a login page before it?"
            )
        return answer.object

    def _absent(self, path: str, answer: _Answer) -> None:
        """Return where an object is not there; raise where the server knows no objects of this kind."""
        if answer.object:
            return
        group = path.split("/")[2] if path.startswith("/apis/") else "core"
        install = " Install KubeRay's operator with its custom resources there." if group == "ray.io" else ""
        raise Unreachable(
            f"{self._name()} has no API at {path} (group {group}).{install} Or is this another cluster than meant? "
            "`kubectl config get-contexts` lists them."
        )

    def _refusal(self, answer: _Answer) -> Exception:
        status, said = answer.status, answer.message
        if status == 409 and answer.object.get("reason") == "AlreadyExists":
            return Taken(said)
        if status == 401:
            return Unreachable(
                f"{self._name()} does not accept the credentials (401): {said}. They are wrong or have expired: log in "
                "again, as for kubectl (`kubectl auth whoami` shows whether it worked)."
            )
        if status == 403 and " cannot " in said:
            return Unreachable(
                f"{self._name()} forbids it (403): {said}. Have that verb added to your role in the namespace; "
                "docs/targets.md lists all that is needed."
            )
        if answer.passes:
            return Unreachable(
                f"{self._name()} cannot answer now ({status}): {said}. It may be overloaded or be starting: try again "
                f"in {max(answer.retry_after_s, 10):.0f} s."
            )
        if "unknown field" in said:
            return UsageError(
                f"{self._name()} refuses it ({status}): {said}. KubeRay's custom resources there are older than "
                "the job needs: have them and the operator updated (1.5.1 has all of it)."
            )
        return UsageError(
            f"{self._name()} refuses it ({status}): {said}. Change what it names: in the target's settings, or in the "
            "recipe's name and resources."
        )

    def _silence(self, error: Exception) -> Unreachable:
        """Nothing came, or nothing whole."""
        import urllib3

        reason = " ".join(str(error).split())
        if isinstance(error, urllib3.exceptions.NameResolutionError):
            why = "its name is not known here. Is the server in the kubeconfig right, and the network or VPN there?"
        elif isinstance(error, urllib3.exceptions.NewConnectionError):
            said = reason.rpartition("Failed to establish a new connection: ")[2]
            why = f"{said}. Is it up, and the VPN or tunnel to it?"
        elif isinstance(error, urllib3.exceptions.TimeoutError):
            why = f"it has been silent for {ANSWER_S:.0f} s. Is the network or VPN to it there, and is it healthy?"
        elif "SSL" in reason or "certificate" in reason.lower():
            why = (
                f"the connection is not secure: {reason}. Is the certificate authority in the kubeconfig that server's?"
            )
        else:
            why = f"the connection broke: {reason}. Try again."
        return Unreachable(f"{self._name()} does not answer: {why}")

    def _name(self) -> str:
        host = self._client.configuration.host if self._client is not None else "?"
        return f"The Kubernetes API server at {host}"
