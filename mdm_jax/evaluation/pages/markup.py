"""Builds HTML elements whose content is escaped."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

Number = int | float


class Html(str):
  """HTML markup; `join` and `el` escape any other string."""


def join(parts: Iterable[Any]) -> Html:
  safe = (p if isinstance(p, Html) else html.escape(str(p)) for p in parts)
  return Html("".join(safe))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
  """Returns an element; `class_` becomes class, `aria_label` aria-label."""
  written = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items()
  )
  return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def small(value: str, note: str) -> Html:
  return join([value, " ", el("small", note)])


def facts(pairs: Iterable[tuple[str, Any]], class_: str) -> Html:
  items = [el("div", el("dt", k), el("dd", v)) for k, v in pairs]
  return el("dl", *items, class_=class_)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html:
  """Returns a table; the first cell of each row names it."""
  top = el("tr", *[el("th", cell, scope="col") for cell in head])
  body = [
    el("tr", el("th", key, scope="row"), *[el("td", c) for c in cells])
    for key, *cells in rows
  ]
  table = el("table", el("thead", top), el("tbody", *body))
  # Wide tables scroll by themselves; with tabindex also by keyboard.
  return el("div", table, class_="scroll", tabindex=0)


def number(value: Number | None, form: str = "") -> str:
  """Formats a number, by default with four digits; a dash if undefined."""
  if value is None or not math.isfinite(value):
    return "\u2013"
  return format(value, form or (",.0f" if abs(value) >= 1000 else ".4g"))
