"""Strict JSON: nan and inf are written as null.

Python's `json` writes a bare NaN, which jq, browsers and most other readers
refuse.
"""

import json
import math
from typing import Any


def dumps(value: Any, **layout: Any) -> str:
  """Returns a value as strict JSON; `layout` is passed to `json.dumps`."""
  return json.dumps(plain(value), allow_nan=False, **layout)


def plain(value: Any) -> Any:
  """Returns a value with every nan and inf replaced by None."""
  if isinstance(value, dict):
    return {key: plain(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [plain(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def number(value: float | None) -> float:
  """Returns a number read from strict JSON: nan for null."""
  return math.nan if value is None else value
