"""Reads TensorFlow Datasets (`tfds:NAME`) without TensorFlow.

TensorFlow is needed only to prepare a data set of the catalogue, once.
"""

import importlib.util
import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from mdm_jax.core import modules, network
from mdm_jax.core.errors import UserError, first_line, nearest
from mdm_jax.data.config import DataConfig
from mdm_jax.data.records import decode
from mdm_jax.data.text_files import Document, Tally


def splits(name: str) -> dict[str, tuple[int, int]]:
  """Returns {split: (examples, bytes)} of a data set, "train" first."""
  found = _builder(name).info.splits
  order = sorted(found, key=lambda part: (part != "train", part))
  return {p: (found[p].num_examples, found[p].num_bytes) for p in order}


def read(
  name: str, part: str, start: int, end: int, data: DataConfig
) -> Iterator[Document]:
  """Yields the examples `start` to `end` of a split."""
  builder = _builder(name)
  feature = _text_feature(name, builder.info.features, data.text_key)
  source = builder.as_data_source(part)
  for i in range(start, end):
    text = source[i][feature]
    if isinstance(text, bytes):
      text = decode(text, f"tfds:{name}/{part}[{i}]")
    yield Document(f"{name}/{part}/{i}", text)


def read_all(name: str, _: Tally, data: DataConfig) -> Iterator[Document]:
  """Yields the examples of all splits."""
  for part, (examples, _) in splits(name).items():
    yield from read(name, part, 0, examples, data)


def _package() -> Any:
  modules.need("tensorflow_datasets", "tfds", "data.corpus=tfds:NAME")
  # Not at the top: it takes a third of a second, and few runs need it.
  import tensorflow_datasets

  return tensorflow_datasets


def _builder(name: str) -> Any:
  """Returns the builder of a data set, which is prepared if it must be."""
  core, folder = _package().core, os.environ.get("TFDS_DATA_DIR")
  try:
    builder = core.read_only_builder.builder_from_files(name, data_dir=folder)
  except (core.DatasetNotFoundError, ValueError, AssertionError):
    return _prepared(name, folder)
  kind = builder.info.file_format.value
  if kind != "array_record":
    raise UserError(
      f"tfds:{name} is prepared as {kind}, which can't be read without"
      " TensorFlow; prepare it as array_record in another TFDS_DATA_DIR"
    )
  return builder


def _prepared(name: str, folder: str | None) -> Any:
  try:
    # array_record, as later runs can read it without TensorFlow.
    builder = _package().builder(
      name, data_dir=folder, file_format="array_record"
    )
  except (ValueError, AssertionError, ImportError) as e:
    raise UserError(f"tfds:{name}: {_unknown(name, e)}") from e
  if not network.reaches("https://www.tensorflow.org"):
    raise UserError(
      f"tfds:{name} is not prepared in {builder.data_path.parent}, and there is"
      " no network to download it; set TFDS_DATA_DIR to where it is"
    )
  if not _has_tensorflow():
    raise UserError(
      f"tfds:{name} is not prepared yet, and that needs TensorFlow once; run:"
      " pip install -e '.[tf]'"
    )
  try:
    builder.download_and_prepare()
  except Exception as e:  # whatever the data set's own code raises
    reason = f"{type(e).__name__}: {first_line(e)}"
    raise UserError(f"tfds:{name} can't be prepared: {reason}") from e
  return builder


def _unknown(name: str, error: Exception) -> str:
  core = _package().core
  if not isinstance(error, core.DatasetNotFoundError):
    return f"{type(error).__name__}: {first_line(error)}"
  base = name.partition("/")[0].partition(":")[0]
  known = core.registered.list_imported_builders()
  advice = [nearest(base, known)] if get_close_matches(base, known) else []
  if not _has_tensorflow():
    advice.append(
      "without TensorFlow a part of the catalogue is hidden (pip install -e"
      " '.[tf]')"
    )
  return "; ".join(["TFDS knows no such data set", *advice])


def _text_feature(name: str, features: Any, key: str) -> str:
  if key in features:
    return key
  text = _package().features.Text
  texts = [k for k, feature in features.items() if isinstance(feature, text)]
  if len(texts) != 1:
    raise UserError(
      f"tfds:{name} has no feature {key!r} and not exactly one Text feature;"
      f" set data.text_key to one of its features: {', '.join(features)}"
    )
  return texts[0]


def _has_tensorflow() -> bool:
  return importlib.util.find_spec("tensorflow") is not None
