"""The results of an evaluation as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mdm_jax.core.progress import console, with_error


def show(results: Mapping[str, Any]) -> None:
  """Prints the results as tables."""
  console.print(_likelihood_table(results))
  if "text_metrics" in results:
    console.print(_text_table(results["text_metrics"]))
  console.print(_target_table(results["targets"]))
  settings = ", ".join(f"{k} {v}" for k, v in results["sampling"].items())
  for i, text in enumerate(results["samples"], start=1):
    console.rule(f"sample {i} ({settings})")
    console.print(text, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
  """A table of one column of words and others of numbers."""
  table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column(columns[0])
  for name in columns[1:]:
    table.add_column(name, justify="right")
  return table


def _likelihood_table(results: Mapping[str, Any]) -> Table:
  text = results["text"]
  whose = text["split"] if text["own"] else text["corpus"]
  title = f"{whose} text, update {results['checkpoint']:,}"
  table = _table(title, "measure", "value")
  nelbo = results["nelbo_per_token"], results["nelbo_stderr"]
  table.add_row("NELBO, nats per token", with_error(*nelbo, ".4f"))
  table.add_row("perplexity bound", f"<= {results['ppl_bound']:.2f}")
  table.add_row("bits per byte", f"<= {results['bits_per_byte']:.4f}")
  for found in results["baselines"].values():
    bits = with_error(found["bits_per_byte"], found["stderr"], ".4f")
    table.add_row(f"  {found['name']}", bits)
  for rate, loss in results["ce_by_mask_rate"].items():
    if round(float(rate) * 100) % 20 == 0 or rate == "0.05":
      table.add_row(f"CE at mask rate {rate}", f"{loss:.3f}")
  names = "documents", "rows", "tokens", "bytes"
  sizes = ", ".join(f"{results[name]:,} {name}" for name in names)
  table.caption = f"of {sizes}"
  table.add_row("tokens seen", f"{results['tokens_seen']:,.0f}")
  table.add_row("wall seconds", f"{results['wall_seconds']:,.0f}")
  return table


def _text_table(metrics: Mapping[str, Any]) -> Table:
  sources = "sampling", "untruncated", "held_out"
  count = metrics["sampling"]["seq_rep_1"]["n"]
  title = f"{count} samples, judged by {metrics['judge']}"
  names = "samples", "samples, T = 1", "test text"
  table = _table(title, "measure", *names)
  for name in metrics["sampling"]:
    found = (metrics[source][name] for source in sources)
    table.add_row(name, *(with_error(m["value"], m["stderr"]) for m in found))
  return table


def _target_table(lines: list[Mapping[str, Any]]) -> Table:
  table = _table("the guide's targets", "target", "measured", "text", "")
  number = lambda x: "-" if x is None else f"{x:.3f}"
  for t in lines:
    table.add_row(
      Text.assemble(
        f"{t['target']}: {t['measure']}\n  ", (t["meaning"], "dim")
      ),
      number(t["value"]),
      number(t["reference"]),
      {True: "pass", False: "miss", None: "-"}[t["passed"]],
    )
  return table
