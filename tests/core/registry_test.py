"""Pieces by name: found, listed, and never two under one name."""

import dataclasses
import fractions

import pytest

from mdm_jax.core import fields
from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry, resolve


@pytest.fixture
def orders():
  found = Registry("sampling order", "sample.order")
  found.register("random", len)
  found.register("confidence", max)
  return found


def test_a_piece_is_found_by_its_name(orders):
  @orders.register("margin")
  def margin():
    pass

  assert orders["margin"] is margin
  assert orders["random"] is len


def test_names_come_in_the_order_of_registration(orders):
  assert [*orders] == ["random", "confidence"]
  assert len(orders) == 2
  assert "random" in orders and "rando" not in orders


@pytest.mark.parametrize(
  "name, advice",
  [
    ("rando", "did you mean 'random'?"),
    ("zzz", "valid: confidence, random"),
  ],
)
def test_an_unknown_name_is_reported_with_its_field_and_the_nearest(
  orders, name, advice
):
  expected = f"sample.order={name!r}: unknown sampling order; {advice}"
  with pytest.raises(UserError) as caught:
    orders[name]
  assert str(caught.value) == expected
  with pytest.raises(UserError, match="^here="):
    orders.check(name, "here")


def test_two_pieces_never_share_a_name(orders):
  with pytest.raises(UserError) as caught:
    orders.register("random", min)
  for part in ("sampling order 'random'", "builtins.len", "builtins.min"):
    assert part in str(caught.value)
  assert orders["random"] is len


def test_a_module_may_be_run_again(orders):
  def run():
    @orders.register("mine")
    class Mine:
      pass

    return Mine

  first, again = run(), run()
  assert first is not again and orders["mine"] is again


def test_instances_that_differ_are_two_pieces(orders):
  orders.register("half", fractions.Fraction(1, 2))
  orders.register("half", fractions.Fraction(1, 2))
  with pytest.raises(UserError, match="two definitions of the"):
    orders.register("half", fractions.Fraction(1, 3))


def test_a_registry_is_found_by_its_path():
  assert resolve(f"{__name__}:THERE") is THERE


THERE = Registry("thing", "some.thing")


# MARK: in a field of the config


@dataclasses.dataclass(frozen=True)
class Section:
  thing: str = fields.field("one", "a thing", registry=f"{__name__}:THERE")


@dataclasses.dataclass(frozen=True)
class Whole:
  parts: tuple[Section, ...] = (Section(),)


def test_a_field_takes_what_is_registered():
  THERE.register("two", 2)
  fields.check(Whole((Section("one"), Section("two"))))
  with pytest.raises(UserError) as caught:
    fields.check(Whole((Section("two"), Section("too"))))
  expected = "parts[1].thing='too': unknown thing; did you mean 'two'?"
  assert str(caught.value) == expected


def test_a_default_is_taken_without_importing_its_module():
  lazy = fields.field("usual", "a thing", registry="nowhere.at_all:THINGS")
  cls = dataclasses.make_dataclass("Lazy", [("thing", str, lazy)])
  fields.check(cls())
  with pytest.raises(ModuleNotFoundError, match="nowhere"):
    fields.check(cls("other"))
