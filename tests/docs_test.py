"""The pages: links lead somewhere, what they show is so."""

import re

import pytest
import yaml
from paths import ROOT

import mdm_jax

PAGES = sorted(
  [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")]
)
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def _anchors(page):
  """The anchors that GitHub gives to a page's headings."""
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M)
  found = []
  for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    found.append(plain.replace(" ", "-"))
  return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
  for link in LINK.findall(CODE.sub("", page.read_text())):
    if re.match(r"https?:|mailto:", link):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert target.is_relative_to(ROOT), link
    assert not anchor or anchor in _anchors(target), link


def test_every_page_is_in_the_index():
  index = LINK.findall((ROOT / "docs" / "README.md").read_text())
  names = {p.name for p in ROOT.glob("docs/*.md")} - {"README.md"}
  assert names <= {*index}


def test_every_config_is_in_the_readme():
  page = (ROOT / "README.md").read_text()
  names = [p.name for p in ROOT.glob("configs/*.py")]
  assert [name for name in names if name not in page] == []


def test_the_readmes_results_are_those_that_other_pages_show():
  page = (ROOT / "README.md").read_text()
  table = page[page.index("## Results") : page.index("One run each")]
  shown = "".join(
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("quickstart", "performance", "results")
  )
  rows = [line.split("|") for line in table.splitlines() if "|" in line]
  results = [cells[3] for cells in rows[2:]]
  numbers = re.findall(r"\d[\d,]*\.\d+|\d+,\d+", " ".join(results))
  assert len(numbers) > 6
  assert [n for n in numbers if not re.search(rf"\b{n}\b", shown)] == []


def test_the_citation_is_of_this_version():
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert cited["cff-version"] == "1.2.0"
  assert cited["title"] and cited["message"]
  assert all(author["name"] for author in cited["authors"])
  assert cited["version"] == mdm_jax.__version__
  project = (ROOT / "pyproject.toml").read_text()
  assert f'license = "{cited["license"]}"' in project
