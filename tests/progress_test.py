"""What is printed is what there is: no text is taken for markup or emoji."""

import ast
import pathlib

import pytest
from rich.table import Table

import mdm_jax
from mdm_jax import plan as plan_lib
from mdm_jax.core.progress import ProgressLine, console
from mdm_jax.evaluation import tables
from mdm_jax.training import scaling_laws

PACKAGE = pathlib.Path(mdm_jax.__file__).parent
TEXTS = ["a :smile: b x[1:m:2]", "a[/b]", "text:data/[e]n/*", "[red]a[/red]"]


def _table(text):
  table = Table(title=text)
  table.add_column(text)
  table.add_row(text)
  console.print(table)


def _plan(text):
  stage = plan_lib.StageForecast(text, "", 8, "0-1", 1, 8, 1.0, 1, 1.0, 1.0)
  laws = scaling_laws.forecast(1e6, 1e6, 2.0)
  plan = plan_lib.Plan(
    text, text, "", 1, 1, 1, 1, (stage,), 8, 8, laws, warnings=(text,)
  )
  plan_lib.show(plan)


def _target(text):
  line = {"target": text, "measure": text, "meaning": text, "value": None}
  console.print(
    tables._target_table([line | {"reference": None, "passed": True}])
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


def test_nothing_else_prints_with_markup():
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path.name}, line {node.lineno}"
        assert name != "Console" or said.get("markup") == "False", where
        assert (
          name != "TextColumn"
          or said.get("markup") == "False"
          or (
            isinstance(node.args[0], ast.Constant)
            and "{" not in node.args[0].value
          )
        ), where
