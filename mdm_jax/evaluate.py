"""From a checkpoint to numbers: likelihood, its curve, and samples."""

from typing import Any

import jax
from rich.table import Table

from mdm_jax.core.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import check_divides, make_mesh
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.prepared import PreparedData, prepare
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.likelihood import Evaluator, subset
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.sampling.generate import generate
from mdm_jax.training.checkpoint import Checkpoints

_CURVE_ROWS = 64


def evaluate_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Measures a run's best checkpoint, writes and returns the results."""
  data = prepare(config)
  check_tokenizer(workdir, data.tokenizer)
  mesh = make_mesh(config.mesh)
  check_divides("eval.batch_size", config.eval.batch_size, mesh)
  with jax.set_mesh(mesh), Checkpoints(workdir.path) as checkpoints:
    return evaluate_checkpoint(config, workdir, data, mesh, checkpoints)


def evaluate_checkpoint(
  config: Config,
  workdir: Workdir,
  data: PreparedData,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
) -> dict[str, Any]:
  """Measures the best checkpoint, writes results.json and prints a table."""
  vocab = data.tokenizer.vocab
  denoiser = Denoiser(config.model, vocab.size, vocab.num_real)
  step, params = load_best(workdir, checkpoints, denoiser)
  evaluator = Evaluator(config.eval, denoiser, vocab.mask, mesh)
  rows = subset(data.held_out, config.eval.final_rows)
  measured = evaluator.likelihood(params, rows)
  curve = evaluator.ce_by_mask_rate(params, subset(rows, _CURVE_ROWS))
  saved = checkpoints.metrics(step)
  wall, tokens = saved["wall_seconds"], saved["tokens_seen"]
  results = {
    "nelbo_per_token": measured.nelbo_per_token,
    "nelbo_stderr": measured.stderr,
    "ppl_bound": measured.ppl_bound,
    "bits_per_byte": measured.bits_per_byte(int(data.num_bytes(rows).sum())),
    "ce_by_mask_rate": curve,
    "eval_rows": measured.rows,
    "eval_tokens": measured.tokens,
    "tokens_seen": tokens,
    "updates": step,
    "wall_seconds": wall,
    "tokens_per_second": tokens / wall,
    "samples": draw_samples(config, denoiser, data.tokenizer, params, mesh),
    "sampling": _sampling_settings(config),
  }
  workdir.write_results(results)
  show(results)
  return results


def load_best(
  workdir: Workdir, checkpoints: Checkpoints, denoiser: Denoiser
) -> tuple[int, Params]:
  """Returns the best checkpoint's update and averaged parameters."""
  step = checkpoints.best()
  if step is None:
    raise UserError(f"workdir {workdir.path} has no checkpoint yet")
  like = jax.eval_shape(denoiser.init, jax.random.key(0))
  return step, checkpoints.restore_ema_params(step, like)


def check_tokenizer(workdir: Workdir, tokenizer: Tokenizer) -> None:
  """Raises UserError if a run was started with another tokenizer."""
  saved = workdir.tokenizer_sha256()
  if saved not in (None, tokenizer.sha256):
    raise UserError(
      f"workdir {workdir.path} was started with another tokenizer (sha256"
      f" {saved[:12]}, now {tokenizer.sha256[:12]}): the text or the"
      " tokenizer's config has changed; use another workdir"
    )


def draw_samples(
  config: Config,
  denoiser: Denoiser,
  tokenizer: Tokenizer,
  params: Params,
  mesh: jax.sharding.Mesh,
) -> list[str]:
  """Returns `sample.num_samples` texts drawn without a prompt."""
  return generate(
    config.sample, denoiser, tokenizer, params, mesh, config.sample_length
  )


def show(results: dict[str, Any]) -> None:
  """Prints the results as tables."""
  table = Table(title=f"held-out text, update {results['updates']:,}")
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


def _sampling_settings(config: Config) -> dict[str, Any]:
  names = ("num_steps", "temperature", "top_k", "top_p", "seed")
  return {name: getattr(config.sample, name) for name in names}
