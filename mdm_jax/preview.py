"""Shows what each stage is going to read: counts, difficulty, examples.

python -m mdm_jax.main --mode=data --config=configs/quickstart.py
"""

from typing import Any

from mdm_jax.config import Config
from mdm_jax.core.progress import console
from mdm_jax.data import corpora, coverage, splits
from mdm_jax.data.config import StageConfig
from mdm_jax.data.prepared import PreparedData, prepare

_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def show_data(config: Config) -> dict[str, Any]:
  """Prepares and prints a config's rows; returns their manifest."""
  data = prepare(config.rows)
  show(config, data)
  return data.manifest


def show(config: Config, data: PreparedData) -> None:
  """Prints how the text is split and what each stage reads."""
  for line in corpora.describe_revisions(data.manifest):
    console.print(line, markup=False, soft_wrap=True)
  console.print(splits.describe(data.manifest["split"]), markup=False)
  console.print()
  for text in describe(config, data).values():
    for line in text.splitlines():
      # Long examples are cut: a line each is enough to see what they are.
      console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()
  if unread := coverage.unread_text(data.manifest["text"]):
    console.print(unread, markup=False)
    console.print()


def describe(config: Config, data: PreparedData) -> dict[str, str]:
  """Returns a text about each stage, keyed by its number and name."""
  names = data.manifest["rows"]
  return {
    f"{i + 1} {stage.name}": _describe(stage, names[f"stage_{i + 1}"])
    for i, stage in enumerate(config.stages)
  }


def _describe(stage: StageConfig, counts: dict[str, Any]) -> str:
  full = counts["tokens"] / max(counts["capacity"], 1)
  lines = [
    f"{stage.name}: {_selection(stage, counts)}",
    f"  {counts['tokens']:,} tokens in {counts['rows']:,} rows of"
    f" {stage.length}, {full:.0%} full",
  ]
  lines += [f"  {line}" for line in coverage.left_out(stage, counts)]
  if counts["difficulty"]:
    lines += _histogram(**counts["difficulty"])
  lines += ["  " + " \u23ce ".join(e.split("\n")) for e in counts["examples"]]
  return "\n".join(lines)


def _selection(stage: StageConfig, counts: dict[str, Any]) -> str:
  found, selected = counts["units_found"], counts["units_selected"]
  if stage.reads_all:
    return f"{stage.unit} of all {found:,} documents"
  longest = "more" if stage.max_words is None else stage.max_words
  return (
    f"the easiest {selected:,} of {found:,} {stage.unit} of {stage.min_words}"
    f" to {longest} words"
  )


def _histogram(histogram: list[int], cut: float) -> list[str]:
  """Returns two lines: bars for difficulties 0 to 1, and a mark at the cut."""
  most = max(max(histogram), 1)
  # Rounded up, so that only an empty bin looks empty.
  heights = [-(-(len(_BARS) - 1) * count // most) for count in histogram]
  bars = "".join(_BARS[height] for height in heights)
  at = min(int(cut * len(histogram)), len(histogram) - 1)
  return [
    f"  difficulty 0 {bars} 1",
    f"               {' ' * at}^ cut at {cut:.3f}",
  ]
