"""Fills in the results of docs/reliability.md from what pytest has written.

  python tests/fault_results.py fast.xml slow.xml

A test belongs to the rows whose numbers are in its name, as in
`test_fault_01_06_...`, `test_safety_S3_...` or `test_found_A3_...`.
"""

import collections
import re
import sys
import xml.etree.ElementTree as ElementTree

from paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| ([ABCS]?\d+) \|.*\|([^|]*)\|$")


def rows_of(name: str) -> list[str]:
  """Returns the numbers of the rows that a test is for."""
  found = re.findall(r"fault((?:_\d\d)+)", name)
  numbers = [number for part in found for number in part.split("_")[1:]]
  return numbers + re.findall(r"(?:safety_|found_)([ABCS]\d+)", name)


def outcomes(paths: list[str]) -> dict[str, collections.Counter]:
  """Returns how many tests of each row passed, failed or were skipped."""
  found = collections.defaultdict(collections.Counter)
  for path in paths:
    for case in ElementTree.parse(path).iter("testcase"):
      kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
      for row in set(rows_of(case.get("name"))):
        found[row][kinds.pop() if kinds else "passed"] += 1
  return found


def fill(page: str, found: dict[str, collections.Counter]) -> str:
  """Returns the page with the results of its rows."""
  lines = []
  for line in page.splitlines():
    row = ROW.match(line)
    if row and row[1] in found:
      told = ", ".join(
        f"{n} {kind}" for kind, n in sorted(found[row[1]].items())
      )
      line = f"{line[: row.start(2)]} {told} |"
    lines.append(line)
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  PAGE.write_text(fill(PAGE.read_text(), outcomes(sys.argv[1:])))
