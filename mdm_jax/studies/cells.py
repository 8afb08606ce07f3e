"""Which runs the study of repeated text consists of, and in which order.

A cell is one run: an objective with its way of training (an arm), an amount of
unique text, a size of the model, a seed, and what was tuned. The order is such
that a study that is cut short says something: first every arm untuned at the
middle amount of text, then the tuning there, then that of other amounts, then
the best setting of each amount, other seeds, and at last other sizes of the
model.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ARMS = {
  "ar": "autoregressive",
  "recipe": "masked diffusion, the recipe's three stages",
  "plain": "masked diffusion, one stage, weights of the bound (MDLM, MD4)",
  "ar_masked": "autoregressive with masked inputs",
}

IS_AR = frozenset({"ar", "ar_masked"})
HAS_STAGES = frozenset({"recipe"})


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is tuned for each arm.

  Attributes:
    rate: factor of the preset's learning rate.
    decay: decoupled weight decay.
    dropout: on the residual branches.
  """

  rate: float = 1.0
  decay: float = 0.1
  dropout: float = 0.0


GRID: dict[str, tuple[float, ...]] = {
  "rate": (0.5, 1.0, 2.0),
  "decay": (0.1, 0.4, 0.8, 1.6),
  "dropout": (0.0, 0.1, 0.2),
}

# What is tried besides, one value after the other while it helps, where the
# best value is the largest one of the grid.
FURTHER: dict[str, tuple[float, ...]] = {
  "rate": (4.0, 8.0, 16.0),
  "decay": (3.2, 6.4),
  "dropout": (0.3, 0.4, 0.5),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """A model: blocks, width and heads."""

  layers: int
  width: int
  heads: int


@dataclasses.dataclass(frozen=True)
class Preset:
  """What a study varies, and what all of its cells have in common.

  Attributes:
    arms: names in `ARMS`.
    parts: 1 / share of the training text that is read, the most text first.
    sizes: the models; the first is the one that is tuned.
    seeds: runs of each arm, amount of text and size.
    updates: of each run, unless it overfits before.
    length: tokens (characters) per row.
    batch: rows per update.
    rate: learning rate, constant after the warm-up.
    warmup: updates of it.
    ema: decay of the averaged parameters, which are what is measured.
    grid: values of each field of `Setting` that are tried, in this order.
    further: larger values of a field, tried one after the other while they
      help, once the whole grid is.
    start: the setting that the tuning starts from.
    retuned: amounts of text that are tuned, too, starting from what is best in
      the middle's grid; the others have the middle's setting.
    evaluations: on validation text, during a run of masked diffusion.
    rows: validation rows, and test rows.
    left_out: what a reader of the results has to know is not in them.
  """

  arms: Sequence[str]
  parts: Sequence[int]
  sizes: Mapping[str, Size]
  seeds: int
  updates: int
  length: int
  batch: int
  rate: float = 4e-3
  warmup: int = 200
  ema: float = 0.995
  grid: Mapping[str, Sequence[float]] = dataclasses.field(
    default_factory=lambda: GRID
  )
  further: Mapping[str, Sequence[float]] = dataclasses.field(
    default_factory=lambda: FURTHER
  )
  start: Setting = Setting()
  retuned: Sequence[int] = ()
  evaluations: int = 40
  rows: tuple[int, int] = (64, 256)
  left_out: str = ""

  @property
  def middle(self) -> int:
    """The amount of text at which everything is tuned first."""
    return self.parts[len(self.parts) // 2]


PRESETS = {
  # An update of 8 rows takes 25 ms of a core, and one of the larger model twice
  # as long. Time goes into updates rather than into tuning that one, because
  # masked diffusion needs many times the updates of autoregression.
  "night": Preset(
    arms=tuple(ARMS),
    parts=(8, 32, 128),
    sizes={"small": Size(2, 64, 2), "medium": Size(3, 96, 3)},
    seeds=3,
    updates=16_000,
    length=128,
    batch=8,
    evaluations=80,
    # What overfits least depends on how little text there is.
    retuned=(128,),
    left_out=(
      "a third size of the model, tuning of the second, tuning with an eighth"
      " of the text, more text than that (masked diffusion would need more"
      " updates than there was time for), and settings in combination: each"
      " field is tuned alone, after the others"
    ),
  ),
  # Not tuned: a script of ten minutes has no time for it.
  "gpu": Preset(
    arms=tuple(ARMS),
    parts=(1, 4, 16),
    sizes={"large": Size(6, 256, 4)},
    seeds=1,
    updates=4000,
    length=256,
    batch=64,
    rate=1e-3,
    warmup=100,
    grid={},
    start=Setting(decay=0.4, dropout=0.1),
    evaluations=20,
    rows=(64, 128),
  ),
  "quick": Preset(
    arms=("ar", "plain"),
    parts=(1, 2),
    sizes={"tiny": Size(1, 32, 2)},
    seeds=1,
    updates=12,
    length=32,
    batch=4,
    warmup=1,
    grid={},
    evaluations=3,
    rows=(4, 4),
  ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study."""

  arm: str
  part: int
  size: str
  seed: int
  setting: Setting = Setting()

  @property
  def name(self) -> str:
    """The name of its folder."""
    tuned = dataclasses.asdict(self.setting)
    values = (f"{name}{value:g}" for name, value in tuned.items())
    return "-".join(
      [self.arm, f"1_{self.part}", self.size, f"seed{self.seed}", *values]
    )


# The validation loss of each cell that is finished.
Losses = Mapping[Cell, float]
# What cell.json has, by cell.
Found = Mapping[Cell, Mapping[str, Any]]


def losses_of(found: Found) -> dict[Cell, float]:
  """Returns the validation loss of finished cells, by which all is chosen."""
  return {cell: run["validation"] for cell, run in found.items()}


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How far the tuning of an arm has come.

  Attributes:
    best: the best values of the fields tuned so far, `start`'s of the others.
    missing: cells that come next; none if all is tuned, or can't begin yet.
    fields: number of fields whose grid is tried.
  """

  best: Setting
  missing: list[Cell]
  fields: int

  def is_finished(self, preset: Preset) -> bool:
    """Returns whether nothing is left to try."""
    return not self.missing and self.fields == len(preset.grid)


def tuning(preset: Preset, arm: str, part: int, losses: Losses) -> Tuning:
  """Returns how far an arm is tuned: one field after the other.

  Each field is tried with the best values of those before it, with one seed and
  the first model. Where the best value is the largest of the grid, larger ones
  follow. At the end the best of all settings that were tried is chosen.

  Args:
    preset: the study.
    arm: whose setting.
    part: the amount of text; one that isn't tuned has the middle's setting.
    losses: of the cells so far.
  """
  if part != preset.middle and part not in preset.retuned:
    return Tuning(tuning(preset, arm, preset.middle, losses).best, [], 0)
  found = _tuned_in_grid(preset, arm, part, losses)
  if not found.is_finished(preset):
    return found
  best = _tuned(preset, arm, part, found.best)
  for field, values in preset.grid.items():
    if getattr(best.setting, field) != max(values):
      continue
    for value in preset.further.get(field, ()):
      setting = dataclasses.replace(best.setting, **{field: value})
      cell = _tuned(preset, arm, part, setting)
      if cell not in losses:
        return Tuning(best.setting, [cell], found.fields)
      if losses[cell] >= losses[best]:
        break
      best = cell
  # A study with another grid may have tried better ones elsewhere.
  tried = [
    cell
    for cell in losses
    if (cell.arm, cell.part) == (arm, part) and _is_for_tuning(preset, cell)
  ]
  best = min(tried, key=losses.__getitem__, default=best)
  return Tuning(best.setting, [], found.fields)


def _tuned_in_grid(
  preset: Preset, arm: str, part: int, losses: Losses
) -> Tuning:
  best = preset.start
  if part != preset.middle:
    middle = _tuned_in_grid(preset, arm, preset.middle, losses)
    best = middle.best
    if not middle.is_finished(preset):
      return Tuning(best, [], 0)
  for number, (field, values) in enumerate(preset.grid.items()):
    tried = [
      _tuned(preset, arm, part, dataclasses.replace(best, **{field: value}))
      for value in values
    ]
    missing = [cell for cell in tried if cell not in losses]
    if missing:
      return Tuning(best, missing, number)
    best = min(tried, key=losses.__getitem__).setting
  return Tuning(best, [], len(preset.grid))


def _tuned(preset: Preset, arm: str, part: int, setting: Setting) -> Cell:
  return Cell(arm, part, next(iter(preset.sizes)), 0, setting)


def cells(preset: Preset, losses: Losses) -> Iterator[Cell]:
  """Yields the cells in their order, as far as is known what was tuned.

  Ask again after every cell: what the tuning has found decides which follow.
  For an arm that isn't tuned yet, all other cells have the best setting so far;
  they stand behind the tuning, so they run only when it is finished.
  """
  for arm in preset.arms:
    yield _tuned(preset, arm, preset.middle, preset.start)
  found = {
    (arm, part): tuning(preset, arm, part, losses)
    for part in (preset.middle, *_other_parts(preset))
    for arm in preset.arms
  }
  for part in (preset.middle, *preset.retuned):
    # The same field of all arms before the next one.
    for arm in sorted(preset.arms, key=lambda arm: found[arm, part].fields):
      yield from found[arm, part].missing
  for size in preset.sizes:
    for seed in range(preset.seeds):
      for arm_part, tuned in found.items():
        yield Cell(*arm_part, size, seed, tuned.best)


def _other_parts(preset: Preset) -> list[int]:
  """Returns the other amounts, the least first: what the claim is about."""
  return sorted({*preset.parts} - {preset.middle}, reverse=True)


def left(preset: Preset, losses: Losses) -> list[Cell]:
  """Returns the cells that are not finished yet, each once, in order."""
  every = dict.fromkeys(cells(preset, losses))
  return [cell for cell in every if cell not in losses]


def count(preset: Preset, found: Found) -> int:
  """Returns the number of cells of a whole study, as far as known.

  How far the tuning goes beyond the grid is known only when it is there.
  """
  tuned = 1 + len(preset.retuned)
  tuning = 1 + sum(len(values) - 1 for values in preset.grid.values())
  final = len(preset.parts) * len(preset.sizes) * preset.seeds
  # The best setting of a tuned amount is one of the tuning's cells.
  planned = len(preset.arms) * (tuned * tuning + final - tuned)
  known = {*in_study(preset, found), *cells(preset, losses_of(found))}
  return planned + sum(_is_further(preset, cell) for cell in known)


def _is_for_tuning(preset: Preset, cell: Cell) -> bool:
  first = next(iter(preset.sizes))
  parts = preset.middle, *preset.retuned
  return (cell.seed, cell.size) == (0, first) and cell.part in parts


def _is_further(preset: Preset, cell: Cell) -> bool:
  """Returns whether a cell belongs to the tuning, but not to its grid."""
  return _is_for_tuning(preset, cell) and any(
    getattr(cell.setting, field) > max(values)
    for field, values in preset.grid.items()
  )


def in_study(preset: Preset, found: Found) -> dict[Cell, Mapping[str, Any]]:
  """Returns the finished cells that the study consists of, as far as known.

  Others are seeds of a setting that isn't the best one any more, now that
  another one is finished, or of a study that had other amounts tuned.
  """
  tuned = {cell for cell in found if _is_for_tuning(preset, cell)}
  known = tuned | {*cells(preset, losses_of(found))}
  return {cell: run for cell, run in found.items() if cell in known}


def plain(cell: Cell) -> dict[str, Any]:
  """Returns a cell as plain values; `from_plain` is the inverse."""
  return dataclasses.asdict(cell)


def from_plain(values: Mapping[str, Any]) -> Cell:
  """Returns the cell of plain values."""
  return Cell(**values | {"setting": Setting(**values["setting"])})
