"""The results of the study of repeated text, from the cells that are finished.

study.json has every cell, study.md the tables; `cell_plot.py` draws them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.core import tables
from mdm_jax.core.progress import with_error
from mdm_jax.core.standard_errors import mean
from mdm_jax.planning import data_reuse, scaling_laws
from mdm_jax.studies import cells as cells_lib
from mdm_jax.studies.cells import ARMS, Cell, Found, Preset

Curve = Sequence[tuple[float, float]]

_AR = "ar"
_AT_THE_END = 0.95  # of the updates: a best checkpoint this late is no best one
_SHARES = (0.25, 0.5, 1.0)  # of the updates, at which two arms are compared


@dataclasses.dataclass(frozen=True)
class Group:
  """The finished seeds of an arm, a size and an amount of text.

  Attributes:
    arm: name in `ARMS`.
    size: name of the model.
    part: 1 / share of the training text.
    runs: cell.json of each seed.
  """

  arm: str
  size: str
  part: int
  runs: Sequence[Mapping[str, Any]]

  @property
  def curve(self) -> list[tuple[float, float]]:
    """Epochs and mean validation loss, as far as every seed has it."""
    curves = [run["curve"] for run in self.runs]
    points = zip(*curves, strict=False)  # a run may have ended early
    return [
      (float(at[0][0]), float(np.mean([loss for _, loss in at])))
      for at in points
    ]

  def number(self, name: str) -> str:
    """Returns the mean of a number over seeds, with its standard error."""
    values = [run[name]["value"] for run in self.runs if name in run]
    if not values:
      return "-"
    found = mean(values)
    # With one seed: the error over the text, which the seeds share.
    alone = self.runs[0][name]["stderr"] if len(values) == 1 else found.stderr
    return with_error(found.value, alone)


def groups(preset: Preset, found: Found) -> list[Group]:
  """Returns the finished runs with the best setting of their arm so far."""
  losses = cells_lib.losses_of(found)
  made = []
  for size in preset.sizes:
    for part in preset.parts:
      for arm in preset.arms:
        best = cells_lib.tuning(preset, arm, part, losses).best
        every = [
          Cell(arm, part, size, seed, best) for seed in range(preset.seeds)
        ]
        if runs := [found[cell] for cell in every if cell in found]:
          made.append(Group(arm, size, part, runs))
  return made


def crossing(ar: Curve, other: Curve) -> float | None:
  """Returns the epochs from which the other's best so far beats AR's.

  Both have read the same text equally often. A curve that ended early keeps its
  best. None if it doesn't happen.
  """
  at = sorted({epochs for epochs, _ in [*ar, *other]})
  best = lambda curve, upto: min(
    (loss for epochs, loss in curve if epochs <= upto), default=np.inf
  )
  wins = [best(other, x) < best(ar, x) for x in at]
  if not wins or not wins[-1]:
    return None
  # The last time that it falls behind, if it does.
  lost = max((i for i, won in enumerate(wins) if not won), default=-1)
  return at[lost + 1]


def as_json(
  preset: Preset, found: Found, text: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the content of study.json."""
  return {
    "text": dict(text),
    "cells": [dict(run) for run in found.values()],
    "cells_of_a_whole_study": cells_lib.count(preset, found),
    "is_complete": not cells_lib.left(preset, cells_lib.losses_of(found)),
  }


# MARK: tables


def as_markdown(
  preset: Preset, found: Found, text: Mapping[str, Any], command: str
) -> str:
  """Returns the content of study.md."""
  every = groups(preset, found)
  total = cells_lib.count(preset, found)
  spent = sum(run["cpu_seconds"] for run in found.values())
  finished = len(found)
  found = cells_lib.in_study(preset, found)
  others = finished - len(found)
  state = "all" if len(found) >= total else "a partial result:"
  parts = [
    "# Repeated text: masked diffusion against autoregression\n",
    f"Written by `{command}`, from {state} {len(found)} of {total} cells;"
    f" {spent:,.0f} CPU seconds."
    + (
      f" {others} more are in study.json and not below.\n" if others else "\n"
    ),
    f"Text of {text['characters']:,} characters (sha256 of its documents"
    f" {text['sha256'][:12]}), one token a character. Rows of {preset.length}"
    f" tokens, {preset.batch} an update, at most {preset.updates:,} updates;"
    " a run that overfits ends early, and its best checkpoint by validation"
    " text is measured. Everything is in bits per byte; less is better.\n",
    _arms(preset, found),
    "## Test text\n",
    _results(preset, every),
    "An autoregressive number is exact. A bound is the mean over all orders in"
    " which tokens can be revealed, the chain rule exact for one of them, left"
    " to right. ± is the standard error over seeds; with one seed, over"
    " documents. `best` is the best checkpoint's epochs, `read` the run's,"
    " `rise` the validation loss at its end above the best one.\n",
    _falling_still(preset, every),
    "## Where the curves cross\n",
    _crossings(every),
    "## The recipe against the plain objective\n",
    _recipe(every),
    "## Tuning\n",
    _tuning(preset, found),
    "## What repeated text is worth\n",
    _fits(every),
    "## Cells\n",
    _missing(preset, found),
  ]
  if preset.left_out:
    parts.insert(4, f"Left out, for lack of time: {preset.left_out}.\n")
  return "\n".join(parts)


def _arms(preset: Preset, found: Found) -> str:
  """Returns a line for every arm: what it is, its settings, whether tuned."""
  losses, lines = cells_lib.losses_of(found), []
  for arm in preset.arms:
    settings = []
    for part in (preset.middle, *preset.retuned):
      tuning = cells_lib.tuning(preset, arm, part, losses)
      best = tuning.best
      where = f"with 1/{part} of the text, " if preset.retuned else ""
      how_far = f"{tuning.fields} of {len(preset.grid)} tuned"
      if tuning.missing and tuning.fields == len(preset.grid):
        how_far += ", beyond the grid not yet"
      settings.append(
        f"{where}learning rate x {best.rate:g}, weight decay {best.decay:g},"
        f" dropout {best.dropout:g} ({how_far})"
      )
    lines.append(f"- `{arm}`: {ARMS[arm]}; {'; '.join(settings)}\n")
  return "".join(lines)


def _results(preset: Preset, every: list[Group]) -> str:
  names = ["model, text, arm", "seeds", "exact or bound", "chain rule"]
  names += ["best", "read", "rise"]
  rows = []
  for group in every:
    curve = group.curve
    best, lowest = min(curve, key=lambda point: point[1])
    bound = "<= " if group.runs[0]["is_bound"] else ""
    rows.append(
      [
        f"{group.size}, {group.runs[0]['characters']:,}, {group.arm}",
        f"{len(group.runs)} of {preset.seeds}",
        bound + group.number("bits_per_byte"),
        group.number("chain_rule"),
        f"{best:.1f}",
        f"{curve[-1][0]:.1f}",
        f"{curve[-1][1] - lowest:.3f}",
      ]
    )
  # The same for every arm: n-gram models of the text that they have read.
  for run in {g.part: g.runs[0] for g in every}.values():
    for name, bits in run["baselines"].items():
      row = [f"{run['characters']:,}, {name}", "", f"{bits:.3f}"]
      rows.append(row + [""] * (len(names) - len(row)))
  return tables.as_markdown(names, rows)


def _falling_still(preset: Preset, every: list[Group]) -> str:
  """Returns which groups were better with every update until the last."""
  tokens = preset.updates * preset.batch * preset.length
  names = []
  for group in every:
    curve, chars = group.curve, group.runs[0]["characters"]
    best, _ = min(curve, key=lambda point: point[1])
    if best >= _AT_THE_END * tokens / chars:
      names.append(f"{group.size}, {chars:,}, {group.arm}")
  if not names:
    return "Every one of these passed its best checkpoint before its end.\n"
  return (
    f"Not converged: {'; '.join(names)}. The best checkpoint is among the last"
    f" {1 - _AT_THE_END:.0%} of all updates, so more of them would give a lower"
    " number.\n"
  )


def _crossings(every: list[Group]) -> str:
  ar = {(g.size, g.part): g for g in every if g.arm == _AR}
  rows = []
  for group in every:
    other = ar.get((group.size, group.part))
    if other is None or group.arm == _AR:
      continue
    epochs = crossing(other.curve, group.curve)
    gap = min(y for _, y in group.curve) - min(y for _, y in other.curve)
    rows.append(
      [
        f"{group.size}, {group.runs[0]['characters']:,}, {group.arm}",
        "-" if epochs is None else f"{epochs:.1f}",
        f"{gap:+.3f}",
      ]
    )
  if not rows:
    return "No arm has a finished run beside an autoregressive one.\n"
  names = ["model, text, arm", "epochs at the crossing", "best minus AR's best"]
  return tables.as_markdown(names, rows) + (
    "\nOn validation text, equally often read; - means that it stays behind."
    " A bound is compared with an exact number here.\n"
  )


def _recipe(every: list[Group]) -> str:
  """Returns the recipe's validation loss minus the plain objective's."""
  by_arm = {(g.size, g.part, g.arm): g.curve for g in every}
  rows = []
  for group in every:
    other = by_arm.get((group.size, group.part, "plain"))
    if group.arm != "recipe" or other is None:
      continue
    # A run that has ended early keeps the loss of its best checkpoint.
    lowest = lambda curve, upto: min(y for x, y in curve if x <= upto)
    last = max(group.curve[-1][0], other[-1][0])
    gaps = [
      lowest(group.curve, last * share) - lowest(other, last * share)
      for share in _SHARES
    ]
    name = f"{group.size}, {group.runs[0]['characters']:,}"
    rows.append([name, *(f"{gap:+.3f}" for gap in gaps)])
  if not rows:
    return "Neither has a finished run beside the other.\n"
  names = ["model, text", *(f"after {share:.0%}" for share in _SHARES)]
  return tables.as_markdown(names, rows) + (
    "\nThe recipe's best validation loss so far minus the plain objective's,"
    " after a share of the longer run's updates; negative where the recipe is"
    " ahead.\n"
  )


def _tuning(preset: Preset, found: Found) -> str:
  if not preset.grid:
    return "This study is not tuned.\n"
  rows = []
  for part in (preset.middle, *preset.retuned):
    for arm in preset.arms:
      rows += _tried(preset, arm, part, found)
  names = ["text, arm"]
  names += ["learning rate x", "weight decay", "dropout", "validation"]
  again = "".join(
    f" With 1/{part} of the training text it starts from what is best in the"
    f" grid with 1/{preset.middle}."
    for part in preset.retuned
  )
  return tables.as_markdown(names, rows) + (
    "\nOne field after the other, with the best values of those before it, one"
    " seed; then, where the largest value of the grid is best, larger ones as"
    " long as they help; the lowest validation loss decides."
    f"{again} Other amounts have the setting of 1/{preset.middle}.\n"
  )


def _tried(
  preset: Preset, arm: str, part: int, found: Found
) -> list[list[str]]:
  """Returns a row for every setting that was tried with an amount of text."""
  best = cells_lib.tuning(preset, arm, part, cells_lib.losses_of(found))
  size, rows = next(iter(preset.sizes)), []
  for cell in sorted(found, key=lambda c: dataclasses.astuple(c.setting)):
    if (cell.arm, cell.part, cell.size, cell.seed) != (arm, part, size, 0):
      continue
    run, setting = found[cell], cell.setting
    mark = " (best so far)" if setting == best.best else ""
    if mark and best.is_finished(preset):
      mark = " (chosen)"
    rows.append(
      [
        f"{run['characters']:,}, {arm}{mark}",
        f"{setting.rate:g}",
        f"{setting.decay:g}",
        f"{setting.dropout:g}",
        f"{run['validation']:.3f}",
      ]
    )
  return rows


def _fits(every: list[Group]) -> str:
  rows = []
  for size, arm in dict.fromkeys((g.size, g.arm) for g in every):
    if arm in cells_lib.HAS_STAGES:
      # The law knows only how much text was read, not at which mask rates.
      rows.append([f"{size}, {arm}", "-", "not fitted: its stages differ"])
      continue
    points = [
      (float(group.runs[0]["characters"]), epochs, loss)
      for group in every
      if (group.size, group.arm) == (size, arm)
      for epochs, loss in _falling(group.curve)
    ]
    fit = data_reuse.fit(points)
    if fit is None:
      rows.append([f"{size}, {arm}", "-", "no fit: too few amounts of text"])
      continue
    says = "" if fit.is_decided else "; the data do not decide R*"
    span = f"{fit.low:.0f} to {fit.high:.0f}, error {fit.error:.3f}{says}"
    rows.append([f"{size}, {arm}", f"{fit.r_star:.0f}", span])
  low, high = scaling_laws.FITTED_UNIQUE_TOKENS
  law = "L = floor + scale / D'^exponent, D' = U + U R* (1 - exp(-(E-1)/R*))"
  table = tables.as_markdown(["model, arm", "R*, epochs", "fits as well"], rows)
  return (
    f"{law}, fitted to validation losses up to the best one.\n\n{table}\n"
    f"Published: {scaling_laws.DIFFUSION_R_STAR:g} for masked diffusion and"
    f" {scaling_laws.AR_R_STAR:g} for autoregression (Prabhudesai et al. 2025),"
    f" from {low / 1e6:g} to {high / 1e6:g} million unique subword tokens.\n"
  )


def _falling(curve: Curve) -> list[tuple[float, float]]:
  """Returns a curve's points up to the best, after a whole epoch."""
  best = min(range(len(curve)), key=lambda i: curve[i][1])
  return [(x, y) for x, y in curve[: best + 1] if x >= 1]


def _missing(preset: Preset, found: Found) -> str:
  losses = cells_lib.losses_of(found)
  missing = cells_lib.left(preset, losses)
  lines = [f"Finished: {', '.join(f'`{cell.name}`' for cell in found)}.\n"]
  if missing:
    lines.append(
      f"Not finished: {cells_lib.count(preset, found) - len(found)}, next"
      f" `{missing[0].name}`.\n"
    )
  return "\n".join(lines)
