"""Exact likelihoods of held-out text, and bounds from several orders.

  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=chain
  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=chain:confidence
  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=orders:8

Each text is scored alone in a row of its own, with one denoiser call for each
of its tokens. What is done is stored after every call of the program, so an
interrupted evaluation continues there.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import distributed, rng, strict_json, tables
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, progress_bar, with_error
from mdm_jax.core.sharding import batch_sharding, padded_rows, put
from mdm_jax.core.standard_errors import ratio
from mdm_jax.data import splits
from mdm_jax.data.held_out import DOCUMENT, ROW, SEGMENT, HeldOut
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.objectives.measured import SEED, likelihood
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.chain_rule import (
  ChainRule,
  Likelihood,
  bound_of_orders,
  make_chain_rule,
)
from mdm_jax.sampling.order import ORDERS
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.workdir import Workdir

_SHORTEST = 16  # tokens of the shortest rows; longer ones are powers of two
_MOST_ORDERS = 4096


@dataclasses.dataclass(frozen=True)
class _Text:
  """A text by itself: its ids, and which of them are predicted."""

  ids: Int[np.ndarray, "N"]
  answer: Bool[np.ndarray, "N"]


def read(spec: str) -> Likelihood:
  """Reads the flag: chain, chain:ORDER or orders:K.

  Raises:
    UserError: it is something else.
  """
  kind, _, value = spec.partition(":")
  if kind == "chain":
    order = value or "left_to_right"
    ORDERS.check(order, "--likelihood=chain")
    return Likelihood(order)
  if kind == "orders" and value.isdecimal():
    if 1 <= int(value) <= _MOST_ORDERS:
      return Likelihood("random", int(value))
  raise UserError(
    f"--likelihood={spec} must be nelbo, chain, chain:ORDER or orders:K with K"
    f" of 1 to {_MOST_ORDERS}"
  )


def measure_workdir(
  config: Config, workdir: Workdir, spec: str
) -> dict[str, Any]:
  """Measures test text with a run's best checkpoint.

  Writes likelihood_NAME.json and prints a table.

  Args:
    config: the run's config; `eval.final_rows` is the number of rows.
    workdir: the run's folder.
    spec: see `read`.

  Returns:
    The content of the file.

  Raises:
    UserError: the objective's samples aren't drawn in any order, or its model
      needs the mask rate.
  """
  which = read(spec)
  data, config = open_rows(config, workdir)
  model = load_model(workdir, config)
  _check(config, model)
  held = data.test.subset(config.eval.final_rows)
  texts = _texts(held)
  what = {
    "likelihood": which.name,
    "checkpoint": model.step,
    "text": describe(data, config, splits.TEST),
    "rows": len(held),
  }
  file = f"likelihood_{which.name}.json"
  nats = _nats(model, which, texts, workdir, file, what)
  by_text = bound_of_orders(nats)
  sizes = np.array([text.answer.sum() for text in texts])
  stderr = ratio(by_text, sizes, held.texts[:, DOCUMENT]).stderr
  whole = "answer" not in held.rows.fields
  values = likelihood(
    which.name,
    which.title,
    total_nats=float(by_text.sum()),
    tokens=int(sizes.sum()),
    num_bytes=held.num_bytes if whole else None,
    stderr=stderr,
    exact=which.exact,
  )
  found = what | {"nats": nats.tolist()}
  found |= {
    name: {"value": v.value, "stderr": v.error} for name, v in values.items()
  }
  workdir.write(file, strict_json.plain(found))
  title = f"test text, {len(texts):,} texts of {held.documents:,} documents"
  shown = [
    (
      v.heading,
      ("<= " if v.bound else "") + with_error(v.value, v.error, ".4f"),
    )
    for v in values.values()
  ]
  console.print(tables.for_terminal(["metric", "value"], shown, title))
  return found


def _check(config: Config, model: TrainedModel) -> None:
  vocab = model.tokenizer.vocab
  with jax.set_mesh(model.mesh):
    order = held_out_objective(config, vocab, model.mesh).decoding().order
  if order != "any_order":
    raise UserError(
      f"objective.name={config.objective.name} has one order only, and"
      " --likelihood=nelbo measures it exactly"
    )


def _texts(held: HeldOut) -> list[_Text]:
  rows = held.rows
  found = []
  for row, segment in held.texts[:, [ROW, SEGMENT]].tolist():
    inside = np.asarray(rows.segments[row]) == segment
    ids = np.asarray(rows.tokens[row])[inside].astype(np.int32)
    found.append(_Text(ids, np.asarray(rows.answer[row])[inside]))
  return found


def _nats(
  model: TrainedModel,
  which: Likelihood,
  texts: list[_Text],
  workdir: Workdir,
  file: str,
  what: dict[str, Any],
) -> Float[np.ndarray, "K N"]:
  """Returns -log p of every text in every order; continues what was stored."""
  nats = np.full((which.orders, len(texts)), math.nan)
  old = workdir.read(file) or {}
  if all(old.get(name) == value for name, value in what.items()):
    nats[:] = [[strict_json.number(x) for x in row] for row in old["nats"]]
  left = np.isnan(nats)
  if 0 < left.sum() < left.size:
    done = left.size - left.sum()
    console.print(f"continuing: {done:,} of {left.size:,} are done")
  programs: dict[int, ChainRule] = {}
  with progress_bar("texts") as bar, jax.set_mesh(model.mesh):
    task = bar.add_task(which.title, total=left.size)
    bar.advance(task, left.size - left.sum())
    for number in range(which.orders):
      todo = np.flatnonzero(left[number])
      for length, picked in _calls(texts, todo, model):
        if length not in programs:
          programs[length] = make_chain_rule(
            which.order, model.denoiser, model.tokenizer.vocab, length
          )
        args = _arguments(texts, picked, number, length, model)
        found = distributed.fetch(programs[length](model.params, *args))
        count = len(np.unique(picked))
        nats[number, picked[:count]] = found[:count]
        bar.advance(task, count)
        stored = what | {"nats": nats.tolist()}
        workdir.write(file, strict_json.plain(stored))
  return nats


def _calls(
  texts: list[_Text], todo: Int[np.ndarray, "M"], model: TrainedModel
) -> Iterator[tuple[int, Int[np.ndarray, "B"]]]:
  """Yields a row length and the texts of each call; the last ones repeat."""
  by_length: dict[int, list[int]] = {}
  most = model.config.stages[-1].length
  for number in todo.tolist():
    size = max(len(texts[number].ids), _SHORTEST)
    length = min(1 << (size - 1).bit_length(), most)
    by_length.setdefault(length, []).append(number)
  for length, numbers in sorted(by_length.items()):
    rows = max(model.config.eval.batch_size * most // length, 1)
    rows = padded_rows(min(rows, len(texts)), model.mesh)
    # Texts of similar lengths together: the longest gives the calls.
    numbers.sort(key=lambda n: len(texts[n].ids))
    for start in range(0, len(numbers), rows):
      picked = numbers[start : start + rows]
      picked += [picked[-1]] * (rows - len(picked))
      yield length, np.array(picked)


def _arguments(
  texts: list[_Text],
  picked: Int[np.ndarray, "B"],
  number: int,
  length: int,
  model: TrainedModel,
) -> tuple[Any, Any]:
  """Returns the texts as a canvas, and a key for each."""
  pad = model.tokenizer.vocab.need("pad")
  tokens = np.full((len(picked), length), pad, np.int32)
  free = np.zeros(tokens.shape, bool)
  for row, n in enumerate(picked):
    size = len(texts[n].ids)
    tokens[row, :size], free[row, :size] = texts[n].ids, texts[n].answer
  lengths = np.array([len(texts[n].ids) for n in picked], np.int32)
  place = lambda x: put(x, batch_sharding(model.mesh, x.ndim))
  stream = rng.stream(SEED, "chain_rule", number)
  split = batch_sharding(model.mesh, rank=1)
  keys = jax.jit(rng.per_row, out_shardings=split)(
    stream, picked.astype(np.int32)
  )
  return Canvas(place(tokens), place(free), place(lengths)), keys
