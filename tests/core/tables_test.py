"""Tables as CSV, as Markdown and for a terminal."""

import csv
import io

from rich.console import Console

from mdm_jax.core import tables

NAMES = "way", "calls", "nats"
ROWS = [("spread, 12", "12.0", "1.5"), ('a "b" | c\n', "3", "-0.25")]


def test_csv_is_read_as_it_was():
  text = tables.as_csv(NAMES, [*ROWS, ("none", None, 2.5)])
  read = list(csv.reader(io.StringIO(text, newline="")))
  assert read == [list(NAMES), *map(list, ROWS), ["none", "", "2.5"]]


def test_markdown_has_a_cell_for_every_value():
  lines = tables.as_markdown(NAMES, ROWS[:1]).splitlines()
  assert lines == [
    "| way | calls | nats |",
    "| --- | ---: | ---: |",
    "| spread, 12 | 12.0 | 1.5 |",
  ]
  assert "a | b" not in tables.as_markdown(["x"], [["a | b"]])


def test_the_terminal_shows_numbers_to_the_right():
  console = Console(file=io.StringIO(), width=60)
  console.print(tables.for_terminal(NAMES, ROWS[:1], "of 4 texts"))
  printed = console.file.getvalue().splitlines()
  row = next(line for line in printed if "spread" in line)
  head = next(line for line in printed if "calls" in line)
  assert "of 4 texts" in printed[0]
  assert row.index("12.0") + 4 == head.index("calls") + 5
