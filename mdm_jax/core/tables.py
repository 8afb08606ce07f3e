"""Tables as CSV, as Markdown and for the terminal."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table


def as_csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Returns a CSV table with a header; None becomes an empty cell."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(names)
  writer.writerows(rows)
  return file.getvalue()


def as_markdown(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a Markdown table; all columns but the first are right-aligned."""
  lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
  escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
  return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def for_terminal(
  names: Sequence[str], rows: Iterable[Sequence[Any]] = (), title: str = ""
) -> Table:
  """Returns a rich table; all columns but the first are right-aligned."""
  table = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False)
  for i, name in enumerate(names):
    table.add_column(name, justify="right" if i else "left", no_wrap=not title)
  for row in rows:
    table.add_row(*row)
  return table
