"""docs/reliability.md says what the code and the tests say."""

import re

import fault_results
import pytest
from paths import TESTS

from mdm_jax.core.errors import Exit
from mdm_jax.runtime.goodput import Cause

PAGE = fault_results.PAGE.read_text()
BEFORE, _, FAULTS = PAGE.partition("## Faults")
ROWS = dict(
  match.groups()
  for line in FAULTS.splitlines()
  if (match := fault_results.ROW.match(line))
)


def _names():
  """The names of all tests, and of the cases that parametrize them."""
  for path in TESTS.rglob("*_test.py"):
    yield from re.findall(
      r"(?:def test_|\")((?:fault|safety|found)_\w+)", path.read_text()
    )


def test_every_fault_has_a_row_with_a_result():
  numbers = [f"{i:02d}" for i in range(1, 39)] + [f"S{i}" for i in range(1, 5)]
  counts = {"A": 17, "B": 10, "C": 10}
  numbers += [f"{x}{i}" for x in counts for i in range(1, counts[x] + 1)]
  assert list(ROWS) == numbers
  for number, result in ROWS.items():
    assert re.fullmatch(r" \d+ passed ", result), number


def test_every_row_has_a_test_and_every_test_a_row():
  tested = {row for name in _names() for row in fault_results.rows_of(name)}
  assert tested == set(ROWS)


def test_exit_codes_are_the_documented_ones():
  table = re.findall(r"^\| (\d+) \| (\w+) \|", BEFORE, re.MULTILINE)
  assert {int(code): name for code, name in table} == {
    int(code): code.name.lower() for code in Exit
  }


def test_causes_are_the_documented_ones():
  line = next(x for x in PAGE.splitlines() if x.startswith("`goodput` causes"))
  assert set(re.findall(r"`(\w+)`", line)) - {"goodput"} == set(map(str, Cause))


@pytest.mark.parametrize(
  ("name", "rows"),
  [
    ("test_fault_01_06_stopped", ["01", "06"]),
    ("test_damage[fault_17_cut]", ["17"]),
    ("test_safety_S3_names", ["S3"]),
    ("test_found_A12_seeds", ["A12"]),
    ("test_fault_tables", []),
  ],
)
def test_a_name_tells_its_rows(name, rows):
  assert fault_results.rows_of(name) == rows


def test_results_are_filled_in(tmp_path):
  report = tmp_path / "report.xml"
  report.write_text(
    '<t><testcase name="test_fault_04_x"/><testcase name="test_fault_04_y">'
    "<failure/></testcase></t>"
  )
  page = "| 04 | a | b | |\n| 05 | a | b | 2 passed |\n"
  found = fault_results.outcomes([str(report)])
  assert fault_results.fill(page, found) == (
    "| 04 | a | b | 1 failure, 1 passed |\n| 05 | a | b | 2 passed |\n"
  )
