"""Measures the sampler's speed, against its denoiser calls and a plain loop.

  python -m mdm_jax.benchmarks.sampler
  python -m mdm_jax.benchmarks.sampler --preset=small_vocab --json

Everything is timed in turn, over and over, in one process, so that other load
on the machine falls on all alike. The ratios are what counts:

trunk      as many denoiser calls as the sampler makes, and nothing else; on a
           GPU the sampler's own calls do less (`model/inference.py`)
head       in every step, the logits of the positions that are drawn
draw       in every step, tokens from such logits
sampler    the whole loop, for several orders and budgets
texts      the same texts in random order, in calls of as many rows as the
           program draws at once (`sampling/generate.py`); and one such call,
           which is what one text costs
plain      the loop of the reference implementation: logits of every position
           in every step, and a draw from [u p, 1 - u] at each (MD4, Shi et al.
           2024, arXiv 2406.04329)
"""

import dataclasses
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.table import Table

from mdm_jax.benchmarks import timing
from mdm_jax.benchmarks.timing import Timed
from mdm_jax.core import log_lines, rng
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import (
  RULES,
  MeshConfig,
  batch_sharding,
  make_mesh,
  padded_rows,
)
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import rows_a_call
from mdm_jax.sampling.sampler import make_sampler


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model, a batch of texts, and the number of steps."""

  num_layers: int
  embed_dim: int
  num_heads: int
  vocab: int
  batch: int
  length: int
  num_steps: int


PRESETS = {
  # Layers, width, heads, text ids, texts, tokens per text, steps.
  "large_vocab": Preset(6, 384, 6, 50_257, 8, 128, 24),
  "small_vocab": Preset(6, 384, 6, 1_000, 8, 128, 24),
  "accelerator": Preset(12, 768, 12, 32_000, 64, 512, 24),
  "accelerator_one_text": Preset(12, 768, 12, 32_000, 1, 512, 24),
  "tiny": Preset(2, 32, 2, 27, 2, 16, 4),
}
WAYS = {
  "random": {},
  "random, top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
  "spread": {"order": "spread"},
  "confidence": {"order": "confidence"},
  "margin": {"order": "margin"},
  "entropy": {"order": "entropy"},
  "confidence, blocks of 32": {"order": "confidence", "block_length": 32},
  "remasking": {"remasking": "cap"},
}


def measure(preset: Preset, repeats: int, only: str = "") -> dict[str, Any]:
  """Measures seconds and ratios of everything, as medians over turns.

  Args:
    preset: the model and the batch.
    repeats: turns.
    only: time only the ways whose names contain this, and random order.
  """
  vocab = Vocabulary.after_text(preset.vocab)
  model = ModelConfig(
    num_layers=preset.num_layers,
    embed_dim=preset.embed_dim,
    num_heads=preset.num_heads,
  )
  denoiser = Denoiser(model, vocab)
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  parts = _parts(preset, denoiser, params, vocab)
  ways, memory = _ways(preset, denoiser, params, vocab, only)
  texts = _texts(preset, denoiser, params, vocab)
  seconds = _time({**parts, **ways, **texts}, repeats)
  trunk, whole = seconds["trunk"], seconds["random"]
  drawn = preset.batch * preset.length
  return {
    "device": jax.devices()[0].device_kind,
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "seconds": seconds,
    "times_trunk": {name: seconds[name] / trunk for name in ways},
    "seconds_a_call": {n: seconds[n] / preset.num_steps for n in ways},
    "tokens_per_second": {name: drawn / seconds[name] for name in ways},
    "share_of_random": {name: seconds[name] / whole for name in parts},
    "plain_over_random": seconds["plain"] / whole,
    "rows_a_call": _rows_a_call(preset),
    "in_calls_over_random": seconds[_IN_CALLS] / whole,
    "temporary_bytes": memory,
    "headline": {
      "sampler: tokens/s": drawn / whole,
      "sampler: times its denoiser calls": whole / trunk,
      "sampler: times as fast as plain": seconds["plain"] / whole,
    },
  }


def _parts(
  preset: Preset, denoiser: Denoiser, params: Params, vocab: Vocabulary
) -> dict[str, Timed]:
  """Returns the trunk, the head and the draw of all steps, each alone."""
  # `most` positions per text are drawn in a step.
  steps, most = preset.num_steps, -(-preset.length // preset.num_steps)
  x = _split(jnp.ones((preset.batch, preset.length), jnp.int32))
  rate = _split(jnp.ones(preset.batch))
  hidden = _split(jnp.ones((preset.batch * most, preset.embed_dim)))
  shape = len(hidden), vocab.size
  logits = _split(jax.random.normal(jax.random.key(0), shape))
  keys = _split(rng.per_row(jax.random.key(0), jnp.arange(len(hidden))))

  # Each step depends on the one before, or XLA would hoist the body out of the
  # loop and run it once.
  @jax.jit
  def trunk(params, x):
    def step(i, x):
      context = row_context(jnp.ones_like(x), condition=rate)
      h = denoiser.hidden(params, x, context)
      return 1 - x + (h[:, :1, 0] > i).astype(jnp.int32)

    return jax.lax.fori_loop(0, steps, step, x)

  @jax.jit
  def head(params, hidden):
    def step(i, hidden):
      logits = denoiser.logits(params, hidden)
      logits = jax.reshard(logits, RULES.spec("batch", None))
      return hidden + jnp.where(logits[:, :1] > i, 1.0, 0.5)

    return jax.lax.fori_loop(0, steps, step, hidden)

  @jax.jit
  def draw(logits, keys):
    def step(i, total):
      at = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      changed = logits * (1 + total % 2).astype(jnp.float32)
      return total + tokens.draw(at, changed, tokens.Settings()).sum()

    return jax.lax.fori_loop(0, steps, step, jnp.int32(0))

  return {
    "trunk": _compiled(trunk, params, x)[0],
    "head": _compiled(head, params, hidden)[0],
    "draw": _compiled(draw, logits, keys)[0],
  }


def _ways(
  preset: Preset,
  denoiser: Denoiser,
  params: Params,
  vocab: Vocabulary,
  only: str,
) -> tuple[dict[str, Timed], dict[str, int]]:
  """Returns whole sampling loops, and the bytes of temporaries of each."""
  compiled = {
    name: _loop(preset, denoiser, params, vocab, preset.batch, fields)
    for name, fields in WAYS.items()
    if only in name or name == "random"
  }
  plain = _plain(denoiser, vocab, preset.num_steps)
  masks = _canvas(preset, vocab, preset.batch).tokens
  key = rng.stream(0, "sample")
  compiled["plain"] = _compiled(plain, params, masks, key)
  ways = {name: run for name, (run, _) in compiled.items()}
  return ways, {name: size for name, (_, size) in compiled.items()}


def _texts(
  preset: Preset, denoiser: Denoiser, params: Params, vocab: Vocabulary
) -> dict[str, Timed]:
  """Returns one call of as many rows as the program draws, and all calls."""
  rows = _rows_a_call(preset)
  call, _ = _loop(preset, denoiser, params, vocab, rows, WAYS["random"])

  def every():
    return [call() for _ in range(-(-preset.batch // rows))]

  return {_ONE: call, _IN_CALLS: every}


def _rows_a_call(preset: Preset) -> int:
  rows = rows_a_call(preset.length, jax.default_backend())
  return padded_rows(rows, jax.sharding.get_mesh())


def _loop(
  preset: Preset,
  denoiser: Denoiser,
  params: Params,
  vocab: Vocabulary,
  rows: int,
  fields: dict[str, Any],
) -> tuple[Timed, int]:
  """Returns a sampling loop over `rows` rows, and its temporary bytes."""
  row_keys = rng.per_row(rng.stream(0, "sample"), jnp.arange(rows))
  config = dataclasses.replace(_UNTRUNCATED, **fields)
  config = dataclasses.replace(config, num_steps=preset.num_steps)
  pace = schedule.pace(config, preset.length)
  pace = jax.device_put(pace, NamedSharding(jax.sharding.get_mesh(), P()))
  # No end of text: a text that ends early would take fewer steps.
  sample = make_sampler(config, denoiser, dataclasses.replace(vocab, end=None))
  canvas = _canvas(preset, vocab, rows)
  settings = tokens.effective_settings(config)
  return _compiled(sample, params, canvas, pace, settings, _split(row_keys))


def _canvas(preset: Preset, vocab: Vocabulary, rows: int) -> Canvas:
  shape = rows, preset.length
  return Canvas(
    _split(jnp.full(shape, vocab.mask, jnp.int32)),
    _split(jnp.ones(shape, bool)),
    _split(jnp.full(rows, preset.length, jnp.int32)),
  )


# The model's own distribution: filters are measured as ways of their own.
_UNTRUNCATED = SampleConfig(
  order="random",
  temperature=1.0,
  temperature_range=None,
  top_k=None,
  top_p=None,
)


_ONE, _IN_CALLS = "one text", "all texts, in calls"


def _plain(denoiser: Denoiser, vocab: Vocabulary, steps: int):
  """Returns MD4's ancestral loop: all logits and draws in every step."""

  @jax.jit
  def sample(params, x, key):
    def step(i, x):
      unmasked = 1 / (steps - i)
      rate = jnp.ones_like(x[:, 0], jnp.float32) - i / steps
      context = row_context(jnp.ones_like(x), condition=rate)
      hidden = denoiser.hidden(params, x, context)
      logits = denoiser.logits(params, hidden.reshape(-1, hidden.shape[-1]))
      logits = jax.reshard(logits, RULES.spec("batch", None))
      probs = jax.nn.softmax(logits).reshape(*x.shape, -1) * unmasked
      stay = jnp.ones_like(probs[..., :1]) - unmasked
      posterior = jnp.log(jnp.concatenate([probs, stay], axis=-1))
      drawn = jax.random.categorical(jax.random.fold_in(key, i), posterior)
      drawn = jnp.where(drawn == probs.shape[-1], vocab.mask, drawn)
      # Newer JAX versions lose the sharding of a batch of one row.
      drawn = jax.reshard(drawn, jax.typeof(x).sharding.spec)
      return jnp.where(x == vocab.mask, drawn, x)

    return jax.lax.fori_loop(0, steps, step, x)

  return sample


def _split(rows: Any) -> Any:
  """Shards rows over the devices."""
  return jax.device_put(
    rows, batch_sharding(jax.sharding.get_mesh(), rows.ndim)
  )


def _compiled(function: Any, *args: Any) -> tuple[Timed, int]:
  """Returns a compiled program with its arguments, and its temporary bytes."""
  program = timing.compiled(function, *args)
  return lambda: program.call(*args), program.temporary_bytes


def _time(runs: dict[str, Timed], repeats: int) -> dict[str, float]:
  seconds = timing.interleave(runs, repeats)
  return {name: statistics.median(s) for name, s in seconds.items()}


# MARK: printing


def _show(name: str, results: dict[str, Any]) -> None:
  table = Table(title=f"{name}, {results['device']}", box=box.SIMPLE_HEAD)
  table.add_column("")
  for column in ("seconds", "x trunk", "ms a call", "tokens/s", "MiB"):
    table.add_column(column, justify="right")
  for way, seconds in results["seconds"].items():
    if way not in results["times_trunk"]:
      table.add_row(way, f"{seconds:.3f}")
      continue
    table.add_row(
      way,
      f"{seconds:.3f}",
      f"{results['times_trunk'][way]:.2f}",
      f"{1000 * results['seconds_a_call'][way]:.1f}",
      f"{results['tokens_per_second'][way]:,.0f}",
      f"{results['temporary_bytes'][way] / 2**20:.0f}",
    )
  console.print(table)


def main(_: list[str]) -> None:
  values = flags.FLAGS
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    results = measure(PRESETS[values.preset], values.repeats, values.ways)
  _show(values.preset, results)
  if values.json:
    print(json.dumps(results))


def _define_flags() -> None:
  flags.DEFINE_enum(
    "preset", "large_vocab", list(PRESETS), "Which model and batch."
  )
  flags.DEFINE_integer("repeats", 5, "Timed runs of each.", 1)
  flags.DEFINE_string("ways", "", "Time only ways whose name holds this.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
