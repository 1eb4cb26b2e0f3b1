"""The pages: HTML that is complete as it comes, in which scripts then draw and keep it up to date."""

from __future__ import annotations

import time
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from cluster.commands.output import age, pretty
from cluster.dashboard.runs import StoreView

FOLDER = Path(__file__).parent
NAVIGATION = [("/", "Runs")]
PARTS = [  # of a run's page
    ("curves", "Curves"),
    ("timeline", "Timeline"),
    ("logs", "Logs"),
    ("config", "Config"),
    ("media", "Media"),
    ("data", "Data"),
]


def add(app: FastAPI, store: StoreView) -> None:
    """Add them to the application."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(static=static, nav=NAVIGATION, store=store.store.uri)
    templates.filters.update(age=age, number=pretty)

    def page(request: Request, template: str, /, **values: Any) -> HTMLResponse:
        shown = templates.get_template(template).render(
            request=request, here=request.url.path, now=time.time(), **values
        )
        return HTMLResponse(shown)

    @app.get("/login", include_in_schema=False)
    def login(request: Request) -> HTMLResponse:
        return page(request, "login.html", wrong="wrong" in request.query_params)

    @app.get("/", include_in_schema=False)
    def overview(request: Request) -> HTMLResponse:
        return page(request, "overview.html", runs=store.summaries())

    @app.get("/runs/{name}", include_in_schema=False)
    def run(request: Request, name: str) -> HTMLResponse:
        view = store.run(name)
        return page(request, "run.html", run=view.summary(), parts=PARTS)


@cache
def static(path: str) -> str:
    """The address of a static file, which changes with its content, so that browsers may keep it."""
    content = (FOLDER / "static" / path).read_bytes()
    return f"/static/{path}?{sha256(content).hexdigest()[:12]}"
