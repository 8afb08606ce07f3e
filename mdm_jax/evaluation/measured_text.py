"""Which text is measured: the run's own, unless another one is asked for."""

import hashlib
from typing import Any

from mdm_jax.core.config import Config
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.prepared import PreparedData, prepare


def open_rows(config: Config, workdir: Workdir) -> PreparedData:
  """Returns the rows of a run, to measure it on.

  Raises:
    UserError: they are not those that the run was started with.
  """
  data = prepare(config, workdir.path, for_training=False)
  workdir.check_tokenizer(data.tokenizer.sha256)
  workdir.check_data(data.manifest)
  return data


def describe(data: PreparedData, config: Config) -> dict[str, Any]:
  """Returns what text the final numbers are of, as plain values."""
  files = data.manifest["files"]
  own = {
    name: sha256 for name, sha256 in files.items() if name.startswith("test.")
  }
  digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
  corpus = config.data.test_corpus or config.data.corpus
  return {"split": "test", "corpus": corpus, "sha256": digest}
