"""From a checkpoint to numbers: likelihood, its curve, and samples."""

from typing import Any

import jax
from rich import box
from rich.table import Table

from mdm_jax.core.config import Config, SampleConfig
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import check_divides, make_mesh
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.prepared import PreparedData, prepare
from mdm_jax.evaluation.likelihood import Evaluator, subset
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.sampling.generate import TextSampler
from mdm_jax.sampling.tokens import effective_temperature
from mdm_jax.training.checkpoint import Checkpoints

_CURVE_ROWS = 64


class Measures:
  """What a model is measured with; each part is compiled once a process."""

  def __init__(
    self, config: Config, data: PreparedData, mesh: jax.sharding.Mesh
  ):
    vocab = data.tokenizer.vocab
    self.config, self.data = config, data
    self.denoiser = Denoiser(config.model, vocab.size, vocab.num_real)
    self.sample = TextSampler(
      config.sample, self.denoiser, data.tokenizer, mesh, config.sample_length
    )
    self._evaluator = Evaluator(config.eval, self.denoiser, vocab.mask, mesh)

  def likelihood(self, params: Params, count: int | None) -> dict[str, Any]:
    """Returns the bound over `count` held-out rows (None: all)."""
    rows = subset(self.data.held_out, count)
    measured = self._evaluator.likelihood(params, rows)
    num_bytes = int(self.data.num_bytes(rows).sum())
    return {
      "nelbo_per_token": measured.nelbo_per_token,
      "nelbo_stderr": measured.stderr,
      "ppl_bound": measured.ppl_bound,
      "bits_per_byte": measured.bits_per_byte(num_bytes),
      "eval_rows": measured.rows,
      "eval_tokens": measured.tokens,
    }

  def ce_by_mask_rate(self, params: Params) -> dict[str, float]:
    """Returns the curve over a few of the rows."""
    count = min(_CURVE_ROWS, self.config.eval.final_rows or _CURVE_ROWS)
    rows = subset(self.data.held_out, count)
    return self._evaluator.ce_by_mask_rate(params, rows)


def evaluate_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Measures a run's best checkpoint, writes and returns the results."""
  data = prepare(config)
  workdir.check_tokenizer(data.tokenizer.sha256)
  mesh = make_mesh(config.mesh)
  check_divides("eval.batch_size", config.eval.batch_size, mesh)
  with jax.set_mesh(mesh), Checkpoints(workdir.path) as checkpoints:
    measures = Measures(config, data, mesh)
    return evaluate_checkpoint(workdir, measures, checkpoints)


def evaluate_checkpoint(
  workdir: Workdir, measures: Measures, checkpoints: Checkpoints
) -> dict[str, Any]:
  """Measures the best checkpoint, writes results.json and prints a table."""
  config = measures.config
  step, params = checkpoints.restore_best_params(measures.denoiser)
  latest = checkpoints.latest()
  run = checkpoints.metrics(latest)
  wall, tokens = run["wall_seconds"], run["tokens_seen"]
  results = measures.likelihood(params, config.eval.final_rows) | {
    "ce_by_mask_rate": measures.ce_by_mask_rate(params),
    "checkpoint": step,
    "updates": latest,
    "tokens_seen": tokens,
    "wall_seconds": wall,
    "tokens_per_second": tokens / wall,
    "sampling": _sampling(config.sample),
    "samples": measures.sample(params),
  }
  workdir.write_results(results)
  show(results)
  return results


def _sampling(config: SampleConfig) -> dict[str, Any]:
  """Returns the settings in effect, to stand beside the samples."""
  return {
    "num_steps": config.num_steps,
    "temperature": effective_temperature(config),
    "top_k": config.top_k,
    "top_p": config.top_p,
    "seed": config.seed,
  }


def show(results: dict[str, Any]) -> None:
  """Prints the results as tables."""
  title = f"held-out text, update {results['checkpoint']:,}"
  table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("measure")
  table.add_column("value", justify="right")
  nelbo, stderr = results["nelbo_per_token"], results["nelbo_stderr"]
  table.add_row("NELBO, nats per token", f"{nelbo:.4f} ± {stderr:.4f}")
  table.add_row("perplexity bound", f"<= {results['ppl_bound']:.2f}")
  table.add_row("bits per byte", f"<= {results['bits_per_byte']:.4f}")
  for rate, loss in results["ce_by_mask_rate"].items():
    if round(float(rate) * 100) % 20 == 0 or rate == "0.05":
      table.add_row(f"CE at mask rate {rate}", f"{loss:.3f}")
  table.add_row("tokens seen", f"{results['tokens_seen']:,.0f}")
  table.add_row("wall seconds", f"{results['wall_seconds']:,.0f}")
  console.print(table)
  settings = ", ".join(f"{k} {v}" for k, v in results["sampling"].items())
  for i, text in enumerate(results["samples"], start=1):
    console.rule(f"sample {i} ({settings})")
    console.print(text, markup=False, soft_wrap=True)
