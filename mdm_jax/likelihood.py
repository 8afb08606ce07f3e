"""Exact likelihoods of held-out text, and bounds from several orders.

  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=chain
  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=chain:confidence
  python -m mdm_jax.main --mode=eval --workdir=W --likelihood=orders:8

Each text is scored alone, with one row of a denoiser call for each of its
tokens (`sampling/chain_calls.py`). What is done is stored after every call, so
an interrupted evaluation continues there.
"""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import strict_json, tables
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console, progress_bar, with_error
from mdm_jax.core.standard_errors import ratio
from mdm_jax.data import splits
from mdm_jax.data.held_out import DOCUMENT
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.objectives.measured import likelihood
from mdm_jax.sampling.chain_calls import (
  ChainCalls,
  Passage,
  key_of_orders,
  passages,
)
from mdm_jax.sampling.chain_rule import Likelihood, bound_of_orders, read
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.workdir import Workdir


def measure_workdir(
  config: Config, workdir: Workdir, spec: str
) -> dict[str, Any]:
  """Measures test text with a run's best checkpoint.

  Writes likelihood_NAME.json and prints a table.

  Args:
    config: the run's config; `eval.final_rows` is the number of rows.
    workdir: the run's folder.
    spec: chain, chain:ORDER or orders:K.

  Returns:
    The content of the file.

  Raises:
    UserError: the objective's samples aren't drawn in any order, or its model
      needs the mask rate.
  """
  which = read(spec, "--likelihood", "nelbo")
  data, config = open_rows(config, workdir)
  model = load_model(workdir, config)
  _check(config, model)
  held = data.test.subset(config.eval.final_rows)
  texts = passages(held)
  what = {
    "likelihood": which.name,
    "checkpoint": model.step,
    "text": describe(data, config, splits.TEST),
    "rows": len(held),
  }
  file = f"likelihood_{which.name}.json"
  nats = _nats(model, which, texts, workdir, file, what)
  by_text = bound_of_orders(nats)
  sizes = np.array([text.free.sum() for text in texts])
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
      f"objective.name={config.objective.name} doesn't draw in any order;"
      " --likelihood=nelbo measures it"
    )


def _nats(
  model: TrainedModel,
  which: Likelihood,
  texts: list[Passage],
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
  longest = model.config.stages[-1].length
  calls = ChainCalls(
    *(which.order, model.denoiser, model.tokenizer.vocab, model.mesh, longest),
    tokens_a_call=model.config.eval.batch_size * longest,
    most_rows=len(texts),
  )
  with progress_bar("texts") as bar, jax.set_mesh(model.mesh):
    task = bar.add_task(which.title, total=left.size)
    bar.advance(task, left.size - left.sum())
    for number in range(which.orders):
      todo = np.flatnonzero(left[number])
      key = key_of_orders(number)
      few = [texts[n] for n in todo]
      for index, found in calls(model.params, few, key, todo):
        nats[number, todo[index]] = found
        bar.advance(task, len(index))
        stored = what | {"nats": nats.tolist()}
        workdir.write(file, strict_json.plain(stored))
  return nats
