"""Console output: no text is taken for markup or emoji."""

import ast
import io
import pathlib
import sys

import pytest
from rich.table import Table

import mdm_jax
from mdm_jax import command_line
from mdm_jax import plan as plan_lib
from mdm_jax.core import progress
from mdm_jax.core.progress import ProgressLine, console
from mdm_jax.evaluation import tables
from mdm_jax.planning import scaling_laws

PACKAGE = pathlib.Path(mdm_jax.__file__).parent
TEXTS = ["a :smile: b x[1:m:2]", "a[/b]", "text:data/[e]n/*", "[red]a[/red]"]


def _table(text):
  table = Table(title=text)
  table.add_column(text)
  table.add_row(text)
  console.print(table)


def _plan(text):
  stage = {"name": text, "objective": "mask 0-1", "length": 8, "rows": 1}
  plan = {
    "name": text,
    "corpus": text,
    "devices": "",
    **dict.fromkeys(("params", "vocabulary", "rows_per_update"), 1),
    **{"held_out_rows": 1, "unique_tokens": 8, "tokens": 8, "seconds": 1.0},
    "stages": [stage | {"epochs": 1.0, "updates": 1, "seconds": 1.0}],
    "laws": scaling_laws.forecast(1e6, 1e6, 2.0),
    **{"notes": [text], "warnings": [text]},
  }
  plan_lib.show(plan)


def _target(text):
  line = {"target": text, "measure": text, "meaning": text, "value": None}
  console.print(
    tables.target_table([line | {"reference": None, "passed": True}])
  )


def _line(text):
  with ProgressLine(3) as line:
    line.say(text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
  "show", [console.print, console.rule, _table, _plan, _target, _line]
)
def test_found_A14_what_is_printed_is_the_text(show, text, capsys):
  show(text)
  # Titles and cells may be broken where they are too wide.
  assert "".join(text.split()) in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_long_lines_break_between_words_on_a_terminal_only(terminal):
  out, text = io.StringIO(), "a longer line than the terminal is wide"
  narrow = type(console)(force_terminal=terminal, width=20, file=out)
  narrow.print(text, soft_wrap=True)
  lines = [line.rstrip() for line in out.getvalue().splitlines()]
  broken = ["a longer line than", "the terminal is wide"]
  assert lines == (broken if terminal else [text])


def test_a_long_runs_progress_line_fits_a_terminal(monkeypatch):
  out = io.StringIO()
  options = {"force_terminal": True, "color_system": None, "file": out}
  terminal = type(console)(width=80, **options)
  monkeypatch.setattr(progress, "console", terminal)
  line, hours = ProgressLine(112_000), 36_000.0
  line.update("III refinement", 99_000, 5.72, 541_636.0, hours, hours + 600)
  terminal.print(line._live.get_renderable())
  told = out.getvalue()
  assert told.startswith("III refinement ") and "left: 10:10:00" in told


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_found_C3_what_stdout_can_not_show_is_replaced(encoding, monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding)
  monkeypatch.setattr(sys, "stdout", out)
  command_line.take_any_text()
  text = "Übung \u2264 \u65e5\u672c"
  for show in (print, console.print, console.rule, _table, _plan, _line):
    show(text)
  out.flush()
  told = out.buffer.getvalue().decode(encoding)
  first = "?" if encoding == "ascii" else "Ü"
  assert told.startswith(f"{first}bung ? ??")
  assert told.count(f"{first}bung") == 12
  assert "---" in told  # lines of a table and a rule, not question marks
  assert "????" not in told


def test_nothing_else_prints_with_markup():
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path.name}, line {node.lineno}"
        assert (
          name not in ("Console", "_Console") or said.get("markup") == "False"
        ), where
        assert (
          name != "TextColumn"
          or said.get("markup") == "False"
          or (
            isinstance(node.args[0], ast.Constant)
            and "{" not in node.args[0].value
          )
        ), where
