"""The JSON schema of a run's file, for editors."""

from __future__ import annotations

from typing import Any

from configs.schema import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12). The settings of task, model and data are left open: their files check them."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "Shardyard run"}
