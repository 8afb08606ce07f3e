"""Fills holes in test text, whose lengths are told and not told.

  python -m mdm_jax.main --mode=infill --workdir=runs/quickstart

Each hole hides 1 to 8 tokens of a text, all lengths equally often, and both
sides are kept. Its tokens are drawn into a hole of the true length, and into
one whose length the model decides ([MASK:1-8]), with the same random numbers.
`eval.samples` is the number of holes.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import strict_json, tables
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.held_out import DOCUMENT
from mdm_jax.measured_text import open_rows
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_calls import (
  ChainCalls,
  Passage,
  key_of_orders,
  passages,
  row_length,
)
from mdm_jax.sampling.generate import TextSampler
from mdm_jax.sampling.template import Candidates
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.workdir import Workdir

LONGEST = 8  # tokens of a hole
_SEED = 0  # of the holes, the same for all models with these texts
FILE = "infilled.json"


@dataclasses.dataclass(frozen=True)
class Hole:
  """A text with a hidden part.

  Attributes:
    text: its number among the texts.
    ids: of the text.
    start: index of the first hidden token.
    size: number of hidden tokens.
  """

  text: int
  ids: Int[np.ndarray, "N"]
  start: int
  size: int

  @property
  def hidden(self) -> Int[np.ndarray, "S"]:
    return self.ids[self.start : self.start + self.size]

  def passage(self) -> Passage:
    """Returns the text, of which the hidden part is scored."""
    free = np.zeros(len(self.ids), bool)
    free[self.start : self.start + self.size] = True
    return Passage(self.ids, free)


def holes(texts: list[Passage], count: int, room: int) -> list[Hole]:
  """Returns `count` holes at random places of texts, in random order.

  A hole has tokens that may be predicted, and given ones on both sides.

  Args:
    texts: where they are made; texts without a place are left out.
    count: number of holes; a text may have several, each by itself.
    room: most tokens of a text, if its hole had the largest length.
  """
  draw, found = np.random.default_rng(_SEED), []
  fitting = [n for n, t in enumerate(texts) if len(t.ids) + LONGEST - 1 <= room]
  order = draw.permutation(fitting).tolist()
  # Texts in turn; a few tries for each hole, as a text may have no place.
  for attempt in range(4 * count if order else 0):
    if len(found) == count:
      break
    number = order[attempt % len(order)]
    text = texts[number]
    size = int(draw.integers(1, LONGEST + 1))
    inside = np.flatnonzero(text.free[1:-1]) + 1
    fits = inside[np.isin(inside + size - 1, inside)]
    # Without a gap of given tokens inside.
    fits = [at for at in fits if text.free[at : at + size].all()]
    if fits:
      found.append(Hole(number, text.ids, int(draw.choice(fits)), size))
  return found


def candidates(
  found: list[Hole], length: int, vocab: Vocabulary
) -> tuple[Candidates, Int[np.ndarray, "N"]]:
  """Returns rows with each length of each hole, and which are the true ones."""
  shape = len(found) * LONGEST, length
  tokens = np.full(shape, vocab.need("pad"), np.int32)
  free, lengths = np.zeros(shape, bool), np.zeros(shape[0], np.int32)
  for n, hole in enumerate(found):
    behind = hole.ids[hole.start + hole.size :]
    for size in range(1, LONGEST + 1):
      row, past = n * LONGEST + size - 1, hole.start + size
      tokens[row, : hole.start] = hole.ids[: hole.start]
      tokens[row, past : past + len(behind)] = behind
      free[row, hole.start : past] = True
      lengths[row] = past + len(behind)
  true = np.array([n * LONGEST + h.size - 1 for n, h in enumerate(found)])
  counts = np.full(len(found), LONGEST)
  return Candidates(Canvas(tokens, free, lengths), free, counts), true


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
  model = load_model(workdir, config)
  vocab = data.tokenizer.vocab
  with jax.set_mesh(model.mesh):
    decoding = held_out_objective(config, vocab, model.mesh).decoding()
  if decoding.order != "any_order":
    raise UserError(
      f"objective.name={config.objective.name} doesn't draw in any order, which"
      " --mode=infill needs"
    )
  longest = config.stages[-1].length
  found = holes(passages(data.test), config.eval.samples, longest)
  if not found:
    raise UserError(
      f"no test text has room for a hole: texts of 3 to {longest - LONGEST + 1}"
      " tokens are needed, and eval.samples of at least 1"
    )
  most = max(len(hole.ids) for hole in found) + LONGEST - 1
  length = row_length(most, longest)
  rows, true = candidates(found, length, vocab)
  with jax.set_mesh(model.mesh):
    sampler = TextSampler(
      *(model.denoiser, data.tokenizer, model.mesh, length), decoding=decoding
    )
    log_p = sampler.hole_lengths(model.params, rows)
    texts = np.arange(len(found))
    chosen = sampler.hole_lengths.choose(
      log_p, rows.counts, texts, texts, config.sample
    )
    nats = _nats(model, found, longest)
    by_way = {}
    for way, row in {"told": true, "untold": chosen}.items():
      canvas = _taken(rows.canvas, row)
      drawn = sampler.draw(model.params, canvas, config.sample).path[-1]
      by_way[way] = np.array(
        [
          np.array_equal(x[free], hole.hidden)
          for x, free, hole in zip(drawn, canvas.free, found, strict=True)
        ],
        np.float64,
      )
  # Several holes may be of one document.
  documents = data.test.texts[:, DOCUMENT][[hole.text for hole in found]]
  result = _summary(by_way, nats, log_p[true], chosen == true, documents)
  written = {"holes": len(found), "checkpoint": model.step}
  written |= {
    name: {"value": v.value, "stderr": v.stderr} for name, v in result.items()
  }
  workdir.write(FILE, strict_json.plain(written))
  _show(result, len(found))
  return written


def _nats(
  model: TrainedModel, found: list[Hole], longest: int
) -> Float[np.ndarray, "N"]:
  """Returns -log p of each hole's text given its length and both sides."""
  calls = ChainCalls(
    *("left_to_right", model.denoiser, model.tokenizer.vocab, model.mesh),
    *(longest, model.config.eval.batch_size * longest),
  )
  nats, texts = np.zeros(len(found)), [hole.passage() for hole in found]
  numbers = np.arange(len(found))
  for index, values in calls(model.params, texts, key_of_orders(0), numbers):
    nats[index] = values
  return nats


def _taken(canvas: Canvas, rows: Int[np.ndarray, "N"]) -> Canvas:
  return Canvas(canvas.tokens[rows], canvas.free[rows], canvas.lengths[rows])


def _summary(
  right: dict[str, Float[np.ndarray, "N"]],
  nats: Float[np.ndarray, "N"],
  log_p: Float[np.ndarray, "N"],
  same: Bool[np.ndarray, "N"],
  documents: Int[np.ndarray, "N"],
) -> dict[str, Estimate]:
  """Returns the metrics; differences have the errors of paired holes."""
  values = {
    "right_told": right["told"],
    "right_untold": right["untold"],
    "right_difference": right["untold"] - right["told"],
    "same_length_untold": np.asarray(same, np.float64),
    "nats_told": nats,
    "nats_untold": nats - log_p,
    "nats_difference": -log_p,
  }
  return {name: mean(value, documents) for name, value in values.items()}


def _show(found: dict[str, Estimate], count: int) -> None:
  cell = lambda name: (
    with_error(found[name].value, found[name].stderr) if name in found else ""
  )
  rows = [
    (
      title,
      *(cell(f"{kind}_{way}") for kind in ("right", "same_length", "nats")),
    )
    for title, way in (
      ("told", "told"),
      (f"1 to {LONGEST} tokens", "untold"),
      ("difference", "difference"),
    )
  ]
  columns = ["length", "right", "of the true length", "nats of a hole"]
  title = f"{count} holes in test text"
  console.print(tables.for_terminal(columns, rows, title))
