"""JSON as the dashboard answers it."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi.responses import JSONResponse


class Json(JSONResponse):
    """Numbers that JSON lacks are null: what is not finite is counted beside them, or written as a word."""

    def render(self, content: Any) -> bytes:
        """As bytes."""
        try:
            text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=str)
        except ValueError:
            text = json.dumps(_finite(content), separators=(",", ":"), default=str)
        return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
