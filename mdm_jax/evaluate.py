"""From a checkpoint to numbers: likelihood, samples, the guide's targets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich import box
from rich.table import Table

from mdm_jax.core.config import Config, SampleConfig
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import check_divides, make_mesh
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.prepared import PreparedData, prepare, training_texts
from mdm_jax.evaluation import samples as samples_lib
from mdm_jax.evaluation import targets
from mdm_jax.evaluation.judge import check as check_judge
from mdm_jax.evaluation.judge import make_judge
from mdm_jax.evaluation.likelihood import Evaluator, subset
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.sampling.generate import Samples, TextSampler, effective
from mdm_jax.training.checkpoint import Checkpoints

_CURVE_ROWS = 64


class Measures:
  """What a model is measured with; each part is compiled once a process."""

  def __init__(
    self,
    config: Config,
    data: PreparedData,
    denoiser: Denoiser,
    mesh: jax.sharding.Mesh,
    poll: Callable[[], None] = lambda: None,
  ):
    """Makes what measures; `poll` is called between its longer parts."""
    check_judge(config.eval.judge)
    self._poll = poll
    self.config, self.data = config, data
    self.denoiser, self.mesh = denoiser, mesh
    self._draw_texts = TextSampler(
      denoiser, data.tokenizer, mesh, config.sample_length
    )
    mask = data.tokenizer.vocab.mask
    self._evaluator = Evaluator(config.eval, denoiser, mask, mesh, poll)

  def likelihood(self, params: Params, count: int | None) -> dict[str, Any]:
    """Returns the bound over `count` held-out rows (None: all)."""
    self._poll()
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

  def by_mask_rate(self, params: Params) -> dict[str, dict[str, float]]:
    """Returns cross-entropies at mask rates, over a few of the rows.

    `ce_by_mask_rate` is the curve, `stage_ce` the mean over the range of the
    last stage: what the training itself looks at, and no likelihood.
    """
    count = min(_CURVE_ROWS, self.config.eval.final_rows or _CURVE_ROWS)
    rows = subset(self.data.held_out, count)
    low, high = self.config.stages[-1].mask_rate or (0.0, 1.0)
    ce = self._evaluator.ce_in_range(params, rows, low, high)
    return {
      "ce_by_mask_rate": self._evaluator.ce_by_mask_rate(params, rows),
      "stage_ce": {f"{low:g},{high:g}": ce},
    }

  def sample(self, params: Params) -> Samples:
    """Returns a few samples, to look at while a training goes on."""
    settings = self.config.sample
    return self._draw(params, settings, settings.num_samples)

  def _curve(self, params: Params) -> dict[str, float] | None:
    """Returns what the optimal schedule follows from; it takes a while."""
    if self.config.sample.schedule != "optimal":
      return None
    return self.by_mask_rate(params)["ce_by_mask_rate"]

  def samples(self, params: Params) -> dict[str, Any]:
    """Returns samples, one of them step by step, and all measures of them."""
    config, shown = self.config, self.config.sample.num_samples
    count = max(config.eval.samples, shown)
    drawn = self._draw(params, config.sample, count)
    results = {
      "sampling": effective(config.sample),
      "samples": drawn.texts[:shown],
      "unmasking": self._unmasking(drawn),
    }
    if config.eval.samples:
      results["text_metrics"] = self._text_metrics(params, drawn)
    return results

  def _draw(
    self, params: Params, settings: SampleConfig, count: int
  ) -> Samples:
    curve = self._curve(params)
    self._poll()
    return self._draw_texts(params, [""] * count, settings, curve)

  def _text_metrics(self, params: Params, drawn: Samples) -> dict[str, Any]:
    config, data = self.config, self.data
    texts = training_texts(config)
    judge = make_judge(config.eval.judge, texts)
    measure = samples_lib.TextMeasures(judge, texts)
    plain = samples_lib.untruncated(config.sample)
    sources = {
      "sampling": drawn.texts,
      "untruncated": self._draw(params, plain, len(drawn.texts)).texts,
      "held_out": samples_lib.reference_texts(
        data.held_out, data.tokenizer, len(drawn.texts), config.sample_length
      ),
    }
    return {
      name: samples_lib.as_plain(measure(texts))
      for name, texts in sources.items()
    } | {"judge": judge.name}

  def _unmasking(self, drawn: Samples) -> dict[str, Any]:
    """The first sample as pieces of text, None where it is masked."""
    vocab, tokenizer = self.data.tokenizer.vocab, self.data.tokenizer
    steps = [
      [None if i == vocab.mask else tokenizer.decode([i]) for i in ids]
      for ids in drawn.path[:, 0].tolist()
    ]
    return {"settings": effective(self.config.sample), "steps": steps}


def evaluate_workdir(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Measures a run's best checkpoint, writes and returns the results."""
  data = prepare(config, workdir.path, for_training=False)
  workdir.check_tokenizer(data.tokenizer.sha256)
  mesh = make_mesh(config.mesh)
  check_divides("eval.batch_size", config.eval.batch_size, mesh)
  vocab = data.tokenizer.vocab
  denoiser = Denoiser(config.model, vocab.size, vocab.num_real)
  with jax.set_mesh(mesh), Checkpoints(workdir.path) as checkpoints:
    measures = Measures(config, data, denoiser, mesh)
    return evaluate_checkpoint(workdir, measures, checkpoints)


def evaluate_checkpoint(
  workdir: Workdir, measures: Measures, checkpoints: Checkpoints
) -> dict[str, Any]:
  """Measures the best checkpoint, writes results.json and prints tables."""
  config = measures.config
  step, params = checkpoints.restore_best_params(measures.denoiser)
  latest = checkpoints.latest()
  run = checkpoints.progress(latest)
  wall, tokens = run["wall_seconds"], run["tokens_seen"]
  results = {
    **measures.likelihood(params, config.eval.final_rows),
    **measures.by_mask_rate(params),
    "checkpoint": step,
    "updates": latest,
    "tokens_seen": tokens,
    "wall_seconds": wall,
    "tokens_per_second": tokens / wall,
    **measures.samples(params),
  }
  unmasking = results.pop("unmasking")
  table = targets.check(results)
  results["targets"] = [dataclasses.asdict(t) for t in table]
  workdir.write_results(results, unmasking)
  show(results)
  return results


# MARK: printing


def show(results: Mapping[str, Any]) -> None:
  """Prints the results as tables."""
  console.print(_likelihood_table(results))
  if "text_metrics" in results:
    console.print(_text_table(results["text_metrics"]))
  console.print(_target_table(results["targets"]))
  settings = ", ".join(f"{k} {v}" for k, v in results["sampling"].items())
  for i, text in enumerate(results["samples"], start=1):
    console.rule(f"sample {i} ({settings})")
    console.print(text, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
  """A table of one column of words and others of numbers."""
  table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column(columns[0])
  for name in columns[1:]:
    table.add_column(name, justify="right")
  return table


def _likelihood_table(results: Mapping[str, Any]) -> Table:
  title = f"held-out text, update {results['checkpoint']:,}"
  table = _table(title, "measure", "value")
  nelbo, stderr = results["nelbo_per_token"], results["nelbo_stderr"]
  table.add_row("NELBO, nats per token", f"{nelbo:.4f} ± {stderr:.4f}")
  table.add_row("perplexity bound", f"<= {results['ppl_bound']:.2f}")
  table.add_row("bits per byte", f"<= {results['bits_per_byte']:.4f}")
  for rate, loss in results["ce_by_mask_rate"].items():
    if round(float(rate) * 100) % 20 == 0 or rate == "0.05":
      table.add_row(f"CE at mask rate {rate}", f"{loss:.3f}")
  table.add_row("tokens seen", f"{results['tokens_seen']:,.0f}")
  table.add_row("wall seconds", f"{results['wall_seconds']:,.0f}")
  return table


def _text_table(metrics: Mapping[str, Any]) -> Table:
  sources = "sampling", "untruncated", "held_out"
  count = metrics["sampling"]["seq_rep_1"]["n"]
  title = f"{count} samples, judged by {metrics['judge']}"
  names = "samples", "samples, T = 1", "held-out text"
  table = _table(title, "measure", *names)
  for name in metrics["sampling"]:
    table.add_row(name, *(_with_error(metrics[s][name]) for s in sources))
  return table


def _with_error(measured: Mapping[str, float | None]) -> str:
  value, stderr = measured["value"], measured["stderr"]
  if value is None:
    return "-"
  return f"{value:.3f}" + (f" ± {stderr:.3f}" if stderr is not None else "")


def _target_table(lines: list[Mapping[str, Any]]) -> Table:
  table = _table("the guide's targets", "target", "measured", "text", "")
  number = lambda x: "-" if x is None else f"{x:.3f}"
  for t in lines:
    table.add_row(
      f"{t['target']}: {t['measure']}\n  [dim]{t['meaning']}[/dim]",
      number(t["value"]),
      number(t["reference"]),
      "pass" if t["passed"] else "miss",
    )
  return table
