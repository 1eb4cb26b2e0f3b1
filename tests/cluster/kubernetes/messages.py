"""What a Kubernetes API server is asked and what it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.kubernetes.fields import Object
from tests.cluster.kubernetes.objects import ApiError, Resource, bad_request

JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}


@dataclass(frozen=True)
class Request:
    """headers: by their names in lower case, without the token."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        query = "&".join(f"{name}={value}" for name, value in self.query.items())
        return f"{self.method} {self.path}" + (f"?{query}" if query else "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(eq=False)
class Stream:
    """An open watch, or a log that is followed. ending: "clean", or "cut" without the end that HTTP has."""

    request: Request
    watch: bool
    ending: str = ""
    expired: bool = False
    bookmark: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass
class Answer:
    """pieces: of a stream, in place of the body; an empty one comes when nothing happens."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stream: Stream | None = None
    pieces: Iterable[bytes] = ()


@dataclass(frozen=True)
class Target:
    """What a path names."""

    resource: Resource
    namespace: str
    name: str
    subresource: str


def as_json(status: int, body: Object, warnings: list[str] | None = None) -> Answer:
    return Answer(status, json.dumps(body).encode() + b"\n", JSON, warnings or [])


def as_error(error: ApiError) -> Answer:
    answer = as_json(error.code, error.status())
    seconds = (error.details or {}).get("retryAfterSeconds")
    return Answer(answer.status, answer.body, JSON | ({"Retry-After": str(seconds)} if seconds else {}))


def number(query: dict[str, str], name: str) -> int | None:
    """None where it is not set."""
    text = query.get(name, "")
    if text and not text.isdecimal():
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text) if text else None
