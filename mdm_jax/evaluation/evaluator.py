"""Measures a model on held-out rows, whatever its objective asks of them.

The objective says what is asked of each row and what the answers come to
(`objectives/base.py`: `jobs`, `pose`, `nats`, `values`). Here the jobs go
through the devices: in batches of one size, so that one program does, spread
over the shards, one batch ahead, and back from all processes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core import distributed
from mdm_jax.core.sharding import (
  batch_sharding,
  data_shards,
  padded_rows,
  put,
)
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.rows import Rows, field
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective
from mdm_jax.objectives.measured import Jobs, Measured, Nats, Part


class Evaluator:
  """Measures parameters on fixed rows with fixed draws; compiled once."""

  def __init__(
    self,
    config: EvalConfig,
    objective: Objective,
    model: Denoiser,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Makes what measures.

    Args:
      config: how many draws a row, how many rows a call.
      objective: what is measured.
      model: the denoiser.
      mesh: devices that it is computed on.
      poll: called as long as batches are done.
    """
    self._config, self._objective, self._mesh = config, objective, mesh
    self._poll = poll
    self._rows_a_call = padded_rows(config.batch_size, mesh)
    self._nats = jax.jit(
      functools.partial(_nats, objective, model),
      static_argnames=("capacity", "num_texts"),
    )

  def measure(
    self, params: Params, held: HeldOut, part: Part = "likelihood"
  ) -> Measured:
    """Returns one part of what the objective measures on some rows.

    Args:
      params: of the model.
      held: the rows.
      part: which; an objective may have nothing there.
    """
    jobs = self._objective.jobs(held, part, self._config.masks_per_row)
    if jobs is None:
      return Measured(headline=self._objective.headline)
    nats = self.ask(params, held.rows, jobs)
    return self._objective.values(part, jobs, nats, held)

  def ask(self, params: Params, rows: Rows, jobs: Jobs) -> Nats:
    """Returns what the answers to all jobs cost."""
    size, total = self._rows_a_call, len(jobs)
    padded = np.arange(total + -total % size) % total
    capacity = self._capacity(rows, jobs.asked[padded])
    # Rounded up: with another text of a row nothing is compiled anew.
    texts = 1 << int(rows.segments[:].max() - 1).bit_length()
    results = []
    for start in range(0, len(padded), size):
      # One batch ahead of the devices, so that a poll means progress.
      jax.block_until_ready(results[-2:-1])
      self._poll()
      job = padded[start : start + size]
      row = jobs.rows[job]
      results.append(
        self._nats(
          params,
          Batch(**{n: self._read(n, v[row]) for n, v in rows.fields.items()}),
          {name: self._place(x[job]) for name, x in jobs.given.items()},
          self._place(row),
          self._place(jobs.draws[job]),
          jobs.key,
          capacity=capacity,
          num_texts=texts,
        )
      )
    by_row, by_text = zip(*distributed.fetch(results), strict=True)
    return Nats(np.concatenate(by_row)[:total], np.concatenate(by_text)[:total])

  def _read(self, name: str, values: np.ndarray) -> Array:
    return put(values.astype(field(name).device), batch_sharding(self._mesh, 2))

  def _place(self, values: np.ndarray) -> Array:
    if np.issubdtype(values.dtype, np.integer):
      values = values.astype(np.int32)
    return put(values, batch_sharding(self._mesh, values.ndim))

  def _capacity(self, rows: Rows, asked: Int[np.ndarray, "N"]) -> int:
    """Returns the most positions that any shard of any batch asks for."""
    shards = data_shards(self._mesh)
    by_shard = asked.reshape(-1, self._rows_a_call // shards)
    most = by_shard.sum(axis=1).max()
    whole = rows.length * self._rows_a_call // shards
    # In eighths of the whole, so that a few rows more don't compile anew.
    step = max(whole // 8, 1)
    return min(int(-(-most // step) * step), whole)


def _nats(
  objective: Objective,
  model: Denoiser,
  params: Params,
  batch: Batch,
  given: dict[str, Array],
  row: Int[Array, "B"],
  draw: Int[Array, "B"],
  key: Key[Array, ""],
  capacity: int,
  num_texts: int,
) -> tuple[Float[Array, "B"], Float[Array, "B S"]]:
  """Asks one batch; keys follow from the row and the draw.

  Returns:
    The nats of each row, and the part of them that is of each of its first
    `num_texts` texts.
  """
  keys = jax.vmap(
    lambda r, d: jax.random.fold_in(jax.random.fold_in(key, r), d)
  )
  part = objective.pose(batch, keys(row, draw), given, capacity)
  nats = objective.nats(model, params, part)
  of = batch.segments[:, :, None] == jnp.arange(1, num_texts + 1)[None, None]
  by_text = jnp.where(of, nats[:, :, None], 0).sum(axis=1)
  return nats.sum(axis=1), by_text
