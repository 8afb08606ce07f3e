"""Evaluates a model on held-out rows, for any objective.

The objective defines what is measured (`objectives/base.py`: `jobs`, `pose`,
`nats`, `values`). The evaluator runs its jobs on the devices: sharded, in
batches of one size so that there is one program, dispatched one batch ahead,
and gathers the results from all processes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mdm_jax.core import distributed
from mdm_jax.core.sharding import batch_sharding, data_shards, padded_rows, put
from mdm_jax.data.batches import Batch
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.rows import Rows, field
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective
from mdm_jax.objectives.measured import Jobs, Measured, Nats, Part


class Evaluator:
  """Evaluates parameters on fixed rows with fixed randomness.

  Rows and masks are the same for every checkpoint, so that differences between
  checkpoints are not sampling noise. Compiles once per shape of rows.

  Example:
    evaluator = Evaluator(config.eval, objective, denoiser, mesh)
    measured = evaluator.measure(state.ema_params, validation)
    print(measured.head().value)
  """

  def __init__(
    self,
    config: EvalConfig,
    objective: Objective,
    model: Denoiser,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Prepares an evaluation; nothing is compiled yet.

    Args:
      config: mask rates per row and rows per call.
      objective: defines what is measured.
      model: the denoiser.
      mesh: devices to run on.
      poll: called before every batch, as a sign of progress; may raise to stop.
    """
    self._config, self._objective, self._mesh = config, objective, mesh
    self._poll = poll
    self._rows_a_call = padded_rows(config.batch_size, mesh)
    self._nats = jax.jit(
      functools.partial(_nats, objective, model),
      static_argnames=("capacity", "num_texts"),
    )
    self._others = {
      name: Evaluator(config, other, model, mesh, poll)
      for name, other in objective.also_measured().items()
    }

  def measure(
    self, params: Params, held: HeldOut, part: Part = "likelihood"
  ) -> Measured:
    """Returns one part of the objective's measurements on held-out rows.

    Those of `Objective.also_measured` follow its own.

    Args:
      params: parameters of the model.
      held: held-out rows.
      part: which part; the result is empty if the objective has none.
    """
    objective = self._objective
    found = Measured(headline=objective.headline)
    jobs = objective.jobs(held, part, self._config.masks_per_row)
    if jobs is not None:
      nats = self.run(params, held.rows, jobs)
      found = objective.values(part, jobs, nats, held)
    for name, other in self._others.items():
      found = found.joined(other.measure(params, held, part).beside(name))
    return found

  def run(self, params: Params, rows: Rows, jobs: Jobs) -> Nats:
    """Returns the loss of all jobs in nats, by row and by text of a row.

    Args:
      params: parameters of the model.
      rows: the rows that the jobs refer to.
      jobs: what to measure, from `Objective.jobs`.
    """
    size, total = self._rows_a_call, len(jobs)
    # The first jobs again fill up the last batch; their results are dropped.
    padded = np.arange(total + -total % size) % total
    capacity = self._capacity(rows, jobs.asked[padded])
    # Static, so rounded up to a power of two: rows with one more text should
    # not cause a recompilation.
    texts = 1 << int(rows.segments[:].max() - 1).bit_length()
    results = []
    for start in range(0, len(padded), size):
      # Dispatch at most one batch ahead of the devices: without this wait all
      # batches would be queued at once, and a poll would not mean progress.
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
    # NumPy's indices are int64, which JAX does not enable by default.
    if np.issubdtype(values.dtype, np.integer):
      values = values.astype(np.int32)
    return put(values, batch_sharding(self._mesh, values.ndim))

  def _capacity(self, rows: Rows, asked: Int[np.ndarray, "N"]) -> int:
    """Returns how many asked positions any shard has in any batch, rounded up.

    Args:
      rows: held-out rows.
      asked: number of positions asked by each job, padded to whole batches.
    """
    shards = data_shards(self._mesh)
    by_shard = asked.reshape(-1, self._rows_a_call // shards)
    most = by_shard.sum(axis=1).max()
    whole = rows.length * self._rows_a_call // shards
    # Static, so rounded up to eighths of all positions: a few rows more should
    # not cause a recompilation.
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
  """Returns the loss of one batch of jobs.

  Returns:
    Nats by row, and by each of its first `num_texts` texts.
  """
  # A key follows from the row and the draw alone, so that masks depend neither
  # on the batch size nor on the devices.
  keys = jax.vmap(
    lambda r, d: jax.random.fold_in(jax.random.fold_in(key, r), d)
  )
  part = objective.pose(batch, keys(row, draw), given, capacity)
  nats = objective.nats(model, params, part)
  # Texts are numbered from 1 within a row; segment 0 is padding.
  of = batch.segments[:, :, None] == jnp.arange(1, num_texts + 1)[None, None]
  by_text = jnp.where(of, nats[:, :, None], 0).sum(axis=1)
  return nats.sum(axis=1), by_text
