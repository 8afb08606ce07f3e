"""docs/configuration.md is what the dataclasses say."""

import dataclasses
import subprocess
import sys

import pytest
from paths import ROOT

from mdm_jax import config_reference
from mdm_jax.config import form
from mdm_jax.core import coercion

FILE = ROOT / "docs" / "configuration.md"
CLASSES = [cls for _, cls in config_reference.sections()]


def test_the_file_is_up_to_date():
  # In a process of its own, where no test has registered anything.
  command = [sys.executable, "-m", "mdm_jax.config_reference"]
  page = subprocess.run(command, capture_output=True, check=True).stdout
  assert FILE.read_text() == page.decode(), (
    "run: python -m mdm_jax.config_reference > docs/configuration.md"
  )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_doc(cls):
  for field in dataclasses.fields(cls):
    if not config_reference._inner(field.type)[0]:
      doc = field.metadata.get("doc", "").strip()
      assert doc, f"{cls.__name__}.{field.name}"
      assert "\n" not in doc


def test_every_section_has_a_docstring_of_its_own():
  assert len(CLASSES) == len(set(CLASSES)) > 10
  generated = dataclasses.make_dataclass("Bare", []).__doc__
  for cls in CLASSES:
    assert cls.__doc__.strip() and not cls.__doc__.startswith(cls.__name__)
  assert generated.startswith("Bare")


def test_every_name_is_one_that_a_flag_can_set():
  text = config_reference.reference()
  for path, cls in config_reference.sections():
    for field in dataclasses.fields(cls):
      name = f"{path}.{field.name}" if path else field.name
      coercion.check_field(name.replace("[i]", "[0]"), form())
      if not config_reference._inner(field.type)[0]:
        assert text.count(f"| `{name}` |") == 1


def test_nested_names_are_written_in_full():
  text = config_reference.reference()
  assert "`data.batch_size`" in text
  assert "`stages[i].epochs`" in text
