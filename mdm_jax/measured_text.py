"""Opens the held-out text that an evaluation measures, the run's or another."""

import dataclasses
import hashlib
from typing import Any

from mdm_jax import config_changes
from mdm_jax.config import Config
from mdm_jax.core.progress import console
from mdm_jax.data import corpora, splits
from mdm_jax.data.prepared import PreparedData, prepare
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.workdir import Workdir

_OTHER = "other_text"  # manifest key of text that is not the run's own


def open_rows(config: Config, workdir: Workdir) -> tuple[PreparedData, Config]:
  """Returns a run's rows for an evaluation, and the config that made them.

  If `data.test_corpus` or `data.validation_corpus` is not the run's own, that
  corpus is measured instead, and a line says so. All else must be the run's.

  Raises:
    UserError: the rows differ from those that the run was started with.
  """
  saved = workdir.read_config()
  named = {f"{side}_corpus": side for side in splits.HELD_OUT}
  own = {name: getattr(saved.data, name) for name in named}
  config = dataclasses.replace(
    config, data=dataclasses.replace(asked := config.data, **own)
  )
  # First the run's own rows, with the run's own corpora: only they have hashes
  # to check.
  data = prepare(config.rows, workdir.path, for_training=False)
  workdir.check_revisions(data.manifest)
  workdir.check_tokenizer(data.tokenizer.sha256)
  workdir.check_data(data.manifest, _advice(saved, config))
  for name, side in named.items():
    if (corpus := getattr(asked, name)) != own[name]:
      data = _with_other(data, config, side, corpus)
  return data, config


def _advice(saved: Config, config: Config) -> str:
  text = (
    "; to evaluate on another text on purpose, set --config.data.test_corpus,"
    " or --config.data.validation_corpus for --mode=frontier and compare"
  )
  changes = [c for c in config_changes.compare(saved, config) if c.fatal]
  return f"{text}\n{config_changes.table(changes)}" if changes else text


def _with_other(
  data: PreparedData, config: Config, side: str, corpus: str
) -> PreparedData:
  """Returns the data with another corpus as one of its held-out splits."""
  field = f"data.{side}_corpus"
  name = field.removeprefix("data.")
  changed = dataclasses.replace(config.data, **{name: corpus})
  rows = dataclasses.replace(config, data=changed).rows
  documents, tally = corpora.load_and_count(corpus, rows.data, field)
  corpora.log_bad(tally)
  texts = [document.text for document in documents]
  held, _ = make_held_out(
    *(texts, rows, data.tokenizer),
    asked=corpora.asked(rows.data, side),
  )
  text = {"corpus": corpus, "sha256": corpora.fingerprint(documents)}
  others = data.manifest.get(_OTHER, {}) | {side: text}
  console.print(
    f"evaluating on another {side} text than the run's own: {corpus},"
    f" {len(texts):,} documents, {held.num_bytes:,} bytes",
    soft_wrap=True,
  )
  return dataclasses.replace(
    data, **{side: held}, manifest=data.manifest | {_OTHER: others}
  )


def without_holes(
  data: PreparedData, config: Config, workdir: Workdir
) -> PreparedData:
  """Returns a run's data with test text in which nothing is hidden.

  Raises:
    UserError: the corpus can't be read.
  """
  if corpora.asked(config.data, splits.TEST) != "holes":
    return data
  shown = dataclasses.replace(config, data=corpora.shown(config.data))
  found = prepare(shown.rows, workdir.path, for_training=False)
  workdir.check_tokenizer(found.tokenizer.sha256)
  return dataclasses.replace(data, test=found.test)


def describe(data: PreparedData, config: Config, side: str) -> dict[str, Any]:
  """Describes the measured text as plain values, to be stored with results.

  Returns:
    The split; whether it is the run's own; the corpus; and a hash of the run's
    prepared rows, or of the documents of another corpus.
  """
  text = {"split": side, "own": True, "corpus": config.data.corpus}
  if other := data.manifest.get(_OTHER, {}).get(side):
    return text | {"own": False} | other
  text["corpus"] = getattr(config.data, f"{side}_corpus") or text["corpus"]
  files = data.manifest["files"]
  # Only this split's files: training rows don't change what is measured.
  own = [f"{n} {files[n]}" for n in sorted(files) if n.startswith(f"{side}.")]
  return text | {"sha256": hashlib.sha256("\n".join(own).encode()).hexdigest()}
