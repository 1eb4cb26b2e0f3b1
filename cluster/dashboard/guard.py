"""Who may see and do what: on every request, before anything else looks at it.

- Requests are answered only under the names that the server goes by (Host), so that a foreign page cannot reach a
  loopback server through a name of its own (DNS rebinding).
- Where a token is set, nothing is shown without it: it is given once at /login, and kept in a cookie that scripts
  cannot read; programs send it as a bearer token.
- What changes something comes by POST, from a page of this server (Origin), with a token against forgery (a header,
  which another site's form cannot set).
- Pages load nothing from elsewhere and run no inline script (Content-Security-Policy).
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "shardyard-session"
FORGERY_HEADER = "x-shardyard-token"
LOGIN = "/login"
_STATIC = "/static/"
_LONGEST_FORM = 4096  # bytes
_SAFE = {"GET", "HEAD"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware. hosts: names and addresses that the server goes by, without port; empty: any."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = frozenset(host.lower() for host in hosts)
        # The cookie is not the token itself, and is worth nothing once the server has ended.
        self._session = secrets.token_urlsafe(32)
        self.forgery_token = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on what is not; either way with headers of safety."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["forgery_token"] = self.forgery_token

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        request = Request(scope, receive)
        answer = self._refusal(request) or await self._login(request)
        await (answer or self._app)(scope, receive, send_safely)

    def _refusal(self, request: Request) -> Response | None:
        host = _host_of(request.headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            return PlainTextResponse(f"This server does not go by the name {host!r}.\n", 421)
        if not self._may_pass(request):
            if request.method in _SAFE and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse(LOGIN, 303)
            return PlainTextResponse("A token is needed.\n", 401, {"www-authenticate": "Bearer"})
        if request.method in _SAFE or request.url.path == LOGIN:
            return None
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
            return PlainTextResponse("This was asked by a page of another site.\n", 403)
        given = request.headers.get(FORGERY_HEADER, "")
        if not (_same(given, self.forgery_token) or self._has_bearer_token(request.headers)):
            return PlainTextResponse("The page is too old: load it again.\n", 403)
        return None

    def _may_pass(self, request: Request) -> bool:
        return (
            self._token is None
            or request.url.path == LOGIN
            or request.url.path.startswith(_STATIC)
            or _same(request.cookies.get(COOKIE, ""), self._session)
            or self._has_bearer_token(request.headers)
        )

    def _has_bearer_token(self, headers: Headers) -> bool:
        return self._token is not None and _same(headers.get("authorization", ""), f"Bearer {self._token}")

    async def _login(self, request: Request) -> Response | None:
        """POST /login: the token for a cookie."""
        if self._token is None or request.url.path != LOGIN or request.method != "POST":
            return None
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_FORM:
                return PlainTextResponse("Too long.\n", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        if not _same(given.strip(), self._token):
            return RedirectResponse(f"{LOGIN}?wrong=1", 303)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, self._session, httponly=True, samesite="strict", secure=secure, path="/")
        return answer


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


def _host_of(header: str) -> str:
    """Without its port: [::1]:80 is ::1."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
