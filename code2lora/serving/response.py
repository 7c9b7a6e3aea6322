"""Answers in JSON, for whatever text a request brought along."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Json(JSONResponse):
    """JSON in ASCII: half a surrogate pair has no UTF-8, and readers may split odd line ends."""

    def render(self, content: Any) -> bytes:
        """Return the bytes. Raises ValueError where there is a number that JSON lacks."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
