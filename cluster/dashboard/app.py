"""The dashboard as an ASGI application: pages (pages.py), the JSON API behind them, and streams of what is new."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from cluster.dashboard import actions, pages, performance_api, run_api, step_examples
from cluster.dashboard.guard import Guard
from cluster.dashboard.json_response import Json
from cluster.dashboard.store_view import StoreView
from cluster.dashboard.stream import Hubs
from configs.errors import NotFound, ShardyardError, UsageError

STATIC = Path(__file__).parent / "static"


def create_app(store: StoreView, *, token: str | None = None, hosts: Iterable[str] = ()) -> FastAPI:
    """The application over a store. token, hosts: see guard.py."""
    hubs = Hubs(store)
    app = FastAPI(
        title="Shardyard",
        summary="What the runs of a store say of themselves.",
        default_response_class=Json,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
    )

    app.state.hubs = hubs

    @app.exception_handler(ShardyardError)
    def explain(request: Request, error: ShardyardError) -> Response:
        status = 404 if isinstance(error, NotFound) else 400 if isinstance(error, UsageError) else 500
        if request.url.path.startswith("/api/"):
            return Json({"error": str(error)}, status)
        return show_error(request, str(error), status)

    @app.get("/api/stream", tags=["streams"])
    async def follow_store() -> StreamingResponse:
        """Server-sent events: `runs` with the overview's rows, whenever they change."""
        return _stream(hubs.store().messages(None))

    @app.get("/api/runs/{name}/stream", tags=["streams"])
    async def follow_run(request: Request, name: str) -> StreamingResponse:
        """Server-sent events: `rows` of metrics, `events` and `summary` of a run, from Last-Event-ID on."""
        return _stream(
            hubs.run(await asyncio.to_thread(store.run, name)).messages(request.headers.get("last-event-id"))
        )

    app.state.actions = actions.add(app, store)
    run_api.add(app, store)
    performance_api.add(app, store)
    step_examples.add(app, store, app.state.actions)
    show_error = pages.add(app, store)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _stream(messages: Any) -> StreamingResponse:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(messages, media_type="text/event-stream", headers=headers)
