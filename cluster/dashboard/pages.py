"""The pages: HTML that is complete as it comes, in which scripts then draw and keep it up to date."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from cluster.commands.output import DEFAULT_STORE, age, pretty
from cluster.dashboard import store_pages
from cluster.dashboard.store_view import StoreView
from data_pipelines.storage import Store

FOLDER = Path(__file__).parent
_NOTHING = "–"
PARTS = [  # of a run's page
    ("curves", "Curves"),
    ("speed", "Speed"),
    ("timeline", "Timeline"),
    ("logs", "Logs"),
    ("config", "Config"),
    ("media", "Media"),
    ("data", "Data"),
]


def add(app: FastAPI, store: StoreView) -> Callable[[Request, str, int], HTMLResponse]:
    """Add them to the application; returns what shows an error as a page."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(static=static, nav=store_pages.NAVIGATION, store=store.store.uri)
    templates.globals.update(is_default_store=Store(DEFAULT_STORE).uri == store.store.uri)
    templates.filters.update(age=age, number=number, share=share, bytes=size, iso=iso)

    def page(request: Request, template: str, /, **values: Any) -> HTMLResponse:
        shown = templates.get_template(template).render(
            request=request, here=request.url.path, now=time.time(), **values
        )
        return HTMLResponse(shown)

    @app.get("/login", include_in_schema=False)
    def login(request: Request) -> HTMLResponse:
        return page(request, "login.html", wrong="wrong" in request.query_params)

    store_pages.add(app, store, page)

    @app.get("/runs/{name}", include_in_schema=False)
    def run(request: Request, name: str) -> HTMLResponse:
        view = store.run(name)
        return page(request, "run.html", run=view.summary(), parts=PARTS)

    def show_error(request: Request, error: str, status: int) -> HTMLResponse:
        title = "There is no such thing" if status == 404 else "This did not work"
        shown = page(request, "error.html", title=title, error=error)
        shown.status_code = status
        return shown

    return show_error


def number(value: Any) -> str:
    """As commands write it, but with the sign that the pages' scripts write for nothing."""
    return _NOTHING if value is None else pretty(value)


def share(value: float | None) -> str:
    """A fraction in percent."""
    return _NOTHING if value is None else f"{100 * value:.{2 if value < 0.1 else 1}f} %"


def size(value: float) -> str:
    """An amount of bytes, in three digits or a few more."""
    for unit, of in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= of:
            return f"{value / of:,.{2 if value < 10 * of else 1 if value < 100 * of else 0}f} {unit}"
    return f"{value:,.0f} B"


def iso(epoch: float) -> str:
    """Epoch seconds as 2026-01-31T12:00:00+00:00: scripts then show them in the reader's own time."""
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="seconds")


@cache
def static(path: str) -> str:
    """The address of a static file, which changes with its content, so that browsers may keep it."""
    content = (FOLDER / "static" / path).read_bytes()
    return f"/static/{path}?{sha256(content).hexdigest()[:12]}"
