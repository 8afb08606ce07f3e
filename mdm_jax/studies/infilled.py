"""Fills holes in test text, whose lengths are told and not told.

  python -m mdm_jax.main --mode=infill --workdir=runs/quickstart

Each hole hides 1 to 8 tokens of a text, all lengths equally often, and both
sides are kept; of a task whose answers are holes, these are hidden. Its tokens
are drawn into a hole of the true length, and into one whose length the model
decides ([MASK:1-8]), with the same random numbers. A model that learned how
long holes are also draws tokens together with the blanks that fill a hole up.
`eval.samples` is the number of holes.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import strict_json, tables
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.data import corpora, tasks
from mdm_jax.data.held_out import DOCUMENT
from mdm_jax.data.prepared import PreparedData
from mdm_jax.measured_text import open_rows, without_holes
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_calls import (
  ChainCalls,
  Passage,
  key_of_orders,
  passages,
  row_length,
)
from mdm_jax.sampling.generate import TextSampler
from mdm_jax.studies import hidden
from mdm_jax.studies.hidden import LONGEST, Hole
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.workdir import Workdir

FILE = "infilled.json"
Values = dict[str, Float[np.ndarray, "N"]]  # of each hole, by way
_TITLES = {
  "told": "told",
  "untold": "1 to {} tokens",
  "together": "1 to {} tokens, drawn with blanks",
  "difference": "untold - told",
  "difference_together": "with blanks - told",
}


def infill_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Fills holes in test text with a run's best checkpoint.

  Writes infilled.json and prints a table.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.

  Returns:
    The content of the file.

  Raises:
    UserError: the model doesn't draw in any order, or no test text has room.
  """
  data, config = open_rows(config, workdir)
  data = without_holes(data, config, workdir)
  model = load_model(workdir, config)
  with jax.set_mesh(model.mesh):
    study = _Study(model, data)
    found = study.holes()
    if not found:
      most = config.stages[-1].length - study.longest + 1
      raise UserError(
        f"no test text has room for a hole: texts of 3 to {most} tokens are"
        " needed, and eval.samples of at least 1"
      )
    right, nats, same = study.measure(found)
  # Several holes may be of one document.
  documents = data.test.texts[:, DOCUMENT][[hole.text for hole in found]]
  result = _summary(right, nats, same, documents)
  written = {
    "holes": len(found),
    "checkpoint": model.step,
    "longest": study.longest,
    "lengths": study.rule,
  }
  written |= {
    name: {"value": v.value, "stderr": v.stderr} for name, v in result.items()
  }
  workdir.write(FILE, strict_json.plain(written))
  title = f"{len(found)} holes in test text, lengths {study.rule}"
  _show(result, title, study.longest)
  return written


class _Study:
  """Draws and scores the holes of a model's test text."""

  def __init__(self, model: TrainedModel, data: PreparedData):
    self._model, self._data, self._config = model, data, model.config
    self._vocab = model.tokenizer.vocab
    self._untold = corpora.untold_hole(self._config.data)
    self.longest, self.rule = self._untold or LONGEST, ""
    objective = held_out_objective(self._config, self._vocab, model.mesh)
    self._decoding = objective.decoding()
    if self._decoding.order != "any_order":
      raise UserError(
        f"objective.name={self._config.objective.name} doesn't draw in any"
        " order, which --mode=infill needs"
      )

  def holes(self) -> list[Hole]:
    texts, count = passages(self._data.test), self._config.eval.samples
    room = self._config.stages[-1].length
    if tasks.has_holes(self._config.data.corpus):
      return hidden.given_holes(texts, count, self.longest, self._vocab)
    return hidden.holes(texts, count, room, self.longest)

  def measure(
    self, found: list[Hole]
  ) -> tuple[Values, Values, Float[np.ndarray, "N"]]:
    """Returns which holes are right, their nats, and which lengths are true."""
    room = self._config.stages[-1].length
    most = max(len(hole.ids) for hole in found) + self.longest - 1
    sampler = self._sampler(row_length(most, room))
    rows, true = hidden.candidates(
      found, sampler.length, self._vocab, self.longest
    )
    settings, texts = self._config.sample, np.arange(len(found))
    self.rule = sampler.hole_lengths.describe(settings.hole_rule)
    log_p = sampler.hole_lengths(self._model.params, rows, settings.hole_rule)
    chosen = sampler.hole_lengths.choose(
      log_p, rows.counts, texts, texts, settings
    )
    told = self._nats([hole.passage() for hole in found], room)
    nats = {"told": told, "untold": told - log_p[true]}
    canvases = {
      "told": _taken(rows.canvas, true),
      "untold": _taken(rows.canvas, chosen),
    }
    right = {
      way: self._right(sampler, canvas, found)
      for way, canvas in canvases.items()
    }
    if self._untold and settings.hole_rule == "auto":
      asked = [hole.untold(self.longest, self._vocab) for hole in found]
      longest = max(room, *(len(text.ids) for text in asked))
      sampler = self._sampler(row_length(most + 1, longest))
      canvas = hidden.canvas_of(asked, sampler.length, self._vocab)
      right["together"] = self._right(sampler, canvas, found)
      nats["together"] = self._nats(asked, longest)
    return right, nats, (chosen == true).astype(np.float64)

  def _sampler(self, length: int) -> TextSampler:
    model = self._model
    return TextSampler(
      *(model.denoiser, self._data.tokenizer, model.mesh, length),
      decoding=self._decoding,
      untold=self._untold,
    )

  def _right(
    self, sampler: TextSampler, canvas: Canvas, found: list[Hole]
  ) -> Float[np.ndarray, "N"]:
    drawn = sampler.draw(self._model.params, canvas, self._config.sample)
    same = []
    for x, free, hole in zip(drawn.path[-1], canvas.free, found, strict=True):
      ids = x[free]
      ids = ids[ids != self._vocab.separator]  # blanks are no text
      same.append(np.array_equal(ids, hole.hidden))
    return np.array(same, np.float64)

  def _nats(self, texts: list[Passage], longest: int) -> Float[np.ndarray, "N"]:
    """Returns -log p of the free tokens of each text, from left to right."""
    model, nats = self._model, np.zeros(len(texts))
    calls = ChainCalls(
      *("left_to_right", model.denoiser, self._vocab, model.mesh),
      *(longest, self._config.eval.batch_size * longest),
    )
    numbers = np.arange(len(texts))
    for index, values in calls(model.params, texts, key_of_orders(0), numbers):
      nats[index] = values
    return nats


def _taken(canvas: Canvas, rows: Int[np.ndarray, "N"]) -> Canvas:
  return Canvas(canvas.tokens[rows], canvas.free[rows], canvas.lengths[rows])


def _summary(
  right: Values,
  nats: Values,
  same: Float[np.ndarray, "N"],
  documents: Int[np.ndarray, "N"],
) -> dict[str, Estimate]:
  """Returns the metrics; differences have the errors of paired holes."""
  found = {"same_length_untold": same}
  for kind, by_way in {"right": right, "nats": nats}.items():
    for way, values in by_way.items():
      found[f"{kind}_{way}"] = values
      if way != "told":
        name = "difference" if way == "untold" else f"difference_{way}"
        found[f"{kind}_{name}"] = values - by_way["told"]
  return {name: mean(value, documents) for name, value in found.items()}


def _show(found: dict[str, Estimate], title: str, longest: int) -> None:
  cell = lambda name: (
    with_error(found[name].value, found[name].stderr) if name in found else ""
  )
  kinds = "right", "same_length", "nats"
  rows = [
    (name.format(longest), *(cell(f"{kind}_{way}") for kind in kinds))
    for way, name in _TITLES.items()
    if f"nats_{way}" in found
  ]
  columns = ["length", "right", "of the true length", "nats of a hole"]
  console.print(tables.for_terminal(columns, rows, title))
