"""Which text is measured: the run's own, unless another one is asked for."""

import dataclasses
import hashlib
from typing import Any

from mdm_jax import config as config_lib
from mdm_jax import config_changes
from mdm_jax.config import Config
from mdm_jax.core.progress import console
from mdm_jax.data import corpora, records, splits
from mdm_jax.data.prepared import PreparedData, prepare
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.workdir import Workdir

_OTHER = "other_text"  # of a manifest: what is measured on purpose


def open_rows(config: Config, workdir: Workdir) -> tuple[PreparedData, Config]:
  """Returns the rows of a run, to measure it on, and the config of those.

  A `data.test_corpus` or `data.validation_corpus` that is not the run's own is
  measured in the place of that side, and said; all else has to be the run's.

  Raises:
    UserError: the rows are not those that the run was started with.
  """
  saved = config_lib.from_dict(workdir.read_config_dict())
  named = {f"{side}_corpus": side for side in splits.HELD_OUT}
  own = {name: getattr(saved.data, name) for name in named}
  config = dataclasses.replace(
    config, data=dataclasses.replace(asked := config.data, **own)
  )
  data = prepare(config.rows, workdir.path, for_training=False)
  workdir.check_tokenizer(data.tokenizer.sha256)
  workdir.check_data(data.manifest, _advice(saved, config))
  for name, side in named.items():
    if (corpus := getattr(asked, name)) != own[name]:
      data = _with_other(data, config, side, corpus)
  return data, config


def _advice(saved: Config, config: Config) -> str:
  text = (
    "; to measure another text on purpose, give it as --config.data.test_corpus"
    " or, to --mode=frontier and compare, as --config.data.validation_corpus"
  )
  changes = config_changes.compare(saved, config).fatal
  return f"{text}\n{config_changes.table(changes)}" if changes else text


def _with_other(
  data: PreparedData, config: Config, side: str, corpus: str
) -> PreparedData:
  """Returns a run's data with another text on a side."""
  field, form = f"data.{side}_corpus", records.form_of(config.data)
  documents, tally = corpora.load_and_count(
    corpus, None, config.data.on_bad_record, form, field
  )
  corpora.tell(tally)
  texts = [document.text for document in documents]
  held, _ = make_held_out(texts, config.rows, data.tokenizer)
  told = {"corpus": corpus, "sha256": corpora.fingerprint(documents)}
  others = data.manifest.get(_OTHER, {}) | {side: told}
  console.print(
    f"measuring another {side} text than the run's own: {corpus},"
    f" {len(texts):,} documents, {held.num_bytes:,} bytes",
    soft_wrap=True,
  )
  return dataclasses.replace(
    data, **{side: held}, manifest=data.manifest | {_OTHER: others}
  )


def describe(data: PreparedData, config: Config, side: str) -> dict[str, Any]:
  """Returns what text numbers are of, as plain values.

  Returns:
    The side of the split; whether the run held it out itself; the corpus; and
    a hash of the rows, or of the texts of another corpus than the run's.
  """
  told = {"split": side, "own": True, "corpus": config.data.corpus}
  if other := data.manifest.get(_OTHER, {}).get(side):
    return told | {"own": False} | other
  told["corpus"] = getattr(config.data, f"{side}_corpus") or told["corpus"]
  files = data.manifest["files"]
  own = [f"{n} {files[n]}" for n in sorted(files) if n.startswith(f"{side}.")]
  return told | {"sha256": hashlib.sha256("\n".join(own).encode()).hexdigest()}
