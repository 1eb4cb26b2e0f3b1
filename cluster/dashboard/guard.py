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
import re
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "shardyard-session"
FORGERY_HEADER = "x-shardyard-token"
LOGIN = "/login"
_STATIC = "/static/"
# Nothing else may stand there: what others make of it (request.url) would be another address than the one asked for.
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
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
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", _caching(scope, message["status"]))
            await send(message)

        request = Request(scope, receive)
        try:
            answer = self._refusal(request) or await self._login(request)
            await (answer or self._app)(scope, receive, send_safely)
        except Exception:
            if not begun:  # the application's own answer to a fault would come without the headers
                await JSONResponse({"error": "This is a fault of the server."}, 500)(scope, receive, send_safely)
            raise

    def _refusal(self, request: Request) -> Response | None:
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if host is None or (self._hosts and host["name"].lower().strip("[]") not in self._hosts):
            return PlainTextResponse("This server does not go by that name (--name gives it another).\n", 421)
        if not self._may_pass(request):
            if request.method in _SAFE and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse(LOGIN, 303)
            return PlainTextResponse("A token is needed.\n", 401, {"www-authenticate": "Bearer"})
        if request.method in _SAFE or request.scope["path"] == LOGIN:
            return None
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != request.headers["host"].lower():
            return PlainTextResponse("This was asked by a page of another site.\n", 403)
        given = request.headers.get(FORGERY_HEADER, "")
        if not (_same(given, self.forgery_token) or self._has_bearer_token(request.headers)):
            return PlainTextResponse("The page is too old: load it again.\n", 403)
        return None

    def _may_pass(self, request: Request) -> bool:
        return (
            self._token is None
            or request.scope["path"] == LOGIN
            or request.scope["path"].startswith(_STATIC)
            or _same(request.cookies.get(COOKIE, ""), self._session)
            or self._has_bearer_token(request.headers)
        )

    def _has_bearer_token(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        return self._token is not None and hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _login(self, request: Request) -> Response | None:
        """POST /login: the token for a cookie."""
        if self._token is None or request.scope["path"] != LOGIN or request.method != "POST":
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


def _caching(scope: Scope, status: int) -> str:
    """Static files are asked for by their content (pages.static), or else are asked for again."""
    if scope["path"].startswith(_STATIC) and status in {200, 304}:
        return "max-age=31536000, immutable" if scope["query_string"] else "no-cache"
    return "no-store"
