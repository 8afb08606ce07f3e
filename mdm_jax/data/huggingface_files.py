"""Finds the files of Hugging Face datasets, with the package `datasets`.

A dataset is on the hub, in a folder, or in the cache of `datasets`.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from mdm_jax.core import modules, network
from mdm_jax.core.errors import UserError, first_line, nearest
from mdm_jax.data.splits import TRAIN

# Formats of tables, by the names of `datasets`; `cache` is what it downloaded.
# Others hold images or sound.
_FORMATS = "parquet", "json", "csv", "text", "arrow", "cache"
_PACKED = ".parquet", ".gz", ".zip", ".zst", ".bz2", ".xz"
_COMPRESSED = 4  # text is about this many times the size of a packed file
_COMMIT = re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OPTION = re.compile(r",(\w+)=([^,]*)$")
_OPTIONS = "subset", "split"


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset: `NAME@REVISION,subset=SUBSET,split=SPLIT`, or a folder.

  Attributes:
    name: name on the hub, or path of a folder.
    revision: commit, branch or tag ('': the main branch, or a folder).
    subset: of a dataset with several (`datasets` calls it config or name).
    split: one of the dataset's splits ('': chosen by `settle`).
  """

  name: str
  revision: str = ""
  subset: str = ""
  split: str = ""

  def __str__(self) -> str:
    options = ((name, getattr(self, name)) for name in _OPTIONS)
    return self.pinned + "".join(f",{k}={v}" for k, v in options if v)

  @property
  def pinned(self) -> str:
    """The name with the revision."""
    return f"{self.name}@{self.revision}" if self.revision else self.name

  @property
  def is_fixed(self) -> bool:
    """Whether the revision is a commit, whose files never change."""
    return bool(_COMMIT.fullmatch(self.revision))

  @property
  def folder(self) -> pathlib.Path | None:
    """The folder; None for a dataset on the hub."""
    return _folder(self.name)


def _folder(text: str) -> pathlib.Path | None:
  path = pathlib.Path(text).expanduser()
  return path if path.is_dir() else None


def parse(text: str) -> Source:
  """Returns the source that follows `hf:`.

  Raises:
    UserError: it is neither a name nor a folder, or has an unknown option.
  """
  rest, options = text, {}
  # A folder may have an @ or a comma in its name.
  while not _folder(rest) and (found := _OPTION.search(rest)):
    option, options[option] = found[1], found[2]
    if option not in _OPTIONS:
      advice = nearest(option, _OPTIONS)
      raise UserError(f"hf:{text}: unknown option {option!r}; {advice}")
    rest = rest[: found.start()]
  if _folder(rest):
    return Source(rest, **options)
  name, _, revision = rest.partition("@")
  if _folder(name):
    raise UserError(f"hf:{text}: a folder has no revision; omit '@{revision}'")
  if pathlib.Path(name).expanduser().is_file():
    raise UserError(f"hf:{text} is a file; write 'text:{name}', or its folder")
  if not _NAME.fullmatch(name):
    raise UserError(
      f"hf:{text} is no folder and no name of a dataset; write"
      " hf:FOLDER or hf:NAME@REVISION,subset=SUBSET,split=SPLIT (only NAME is"
      " required)"
    )
  return Source(name, revision, **options)


# MARK: splits and files


def split(source: Source, columns: tuple[str, ...] = ()) -> Any:
  """Returns the stream of the split that a source names; arguments as below."""
  found = splits(source, columns)
  if source.split not in found:
    advice = nearest(source.split, found)
    raise UserError(f"hf:{source}: unknown split {source.split!r}; {advice}")
  return found[source.split]


def splits(source: Source, columns: tuple[str, ...] = ()) -> dict[str, Any]:
  """Returns the streams of all splits; some formats open a file for it."""
  with explained(f"hf:{source}"):
    found = builder(source, columns).as_streaming_dataset()
    return {str(name): rows for name, rows in found.items()}


def pieces(source: Source, rows: Any, path: str) -> Any:
  """Returns the rows of a file; its shards are its row groups, if it has any.

  Args:
    source: with a split.
    rows: the split's stream.
    path: one of `paths`.
  """
  count = rows.num_shards
  with explained(path):
    return rows.shard(count, paths(source, count).index(path)).reshard()


def paths(source: Source, count: int) -> list[str]:
  """Returns the paths, or addresses with the commit, of a split's files.

  Args:
    source: with a split.
    count: number of files.
  """
  found = list((builder(source).config.data_files or {}).get(source.split, ()))
  # In the cache of `datasets` the files have no names of their own.
  return (
    found if len(found) == count else [f"{source}#{i}" for i in range(count)]
  )


def weights(source: Source, count: int) -> dict[str, int]:
  """Returns about how many bytes of text each file has; arguments as above."""
  import fsspec

  splits = builder(source).info.splits or {}
  known = source.split in splits and splits[source.split].num_bytes
  found = {}
  for path in paths(source, count):
    if known:
      found[path] = known // count
    else:
      size = fsspec.core.url_to_fs(path)[0].size(path)
      found[path] = size * (_COMPRESSED if path.endswith(_PACKED) else 1)
  return found


# MARK: the package


def builder(source: Source, columns: tuple[str, ...] = ()) -> Any:
  """Returns the builder of `datasets`, which knows and reads the files.

  Args:
    source: the dataset; its split doesn't matter.
    columns: of a .parquet, the only ones that are read (empty: all).

  Raises:
    UserError: the dataset isn't found, or is of a kind without text.
  """
  source = dataclasses.replace(source, split="")
  # The files of a branch or a folder may change while the process runs.
  build = _build_once if source.is_fixed else _build
  found = build(source, columns)
  if found.name not in _FORMATS:
    raise UserError(
      f"hf:{source} is read by the {found.name!r} reader of datasets; only"
      f" tables with text are supported: {', '.join(_FORMATS[:-1])}"
    )
  if source.is_fixed and found.hash != source.revision:
    raise UserError(
      f"hf:{source} is not in the cache, which has revision {found.hash}"
    )
  return found


def _build(source: Source, columns: tuple[str, ...]) -> Any:
  datasets = _package()
  if not source.folder:
    _check_network(source, datasets.config)
  with explained(f"hf:{source}"):
    if files := source.folder and _saved(source.folder):
      if source.subset:
        raise UserError(f"hf:{source}: save_to_disk wrote it without subsets")
      return datasets.load_dataset_builder("arrow", data_files=files)
    path, revision = str(source.folder or source.name), source.revision or None
    more = {"columns": list(columns)} if columns else {}
    try:
      return datasets.load_dataset_builder(
        path, source.subset or None, revision=revision, **more
      )
    except ConnectionError as error:
      raise UserError(
        f"hf:{source} is not in the cache of datasets, and the hub can't be"
        f" asked ({first_line(error)}); {_download(source)}"
      ) from error
    except ValueError:
      names = datasets.get_dataset_config_names(path, revision=revision)
      if source.subset in names or not (source.subset or names[1:]):
        raise
      raise UserError(_which_subset(source, names)) from None


_build_once = functools.cache(_build)


def _package() -> Any:
  modules.need("datasets", "huggingface", "data.corpus=hf:NAME")
  # Not at the top: it takes most of a second, and few runs need it.
  import datasets

  # What it logs as an error it also raises, and a user gets one line.
  datasets.logging.set_verbosity(datasets.logging.CRITICAL)
  datasets.disable_progress_bars()
  return datasets


def _check_network(source: Source, config: Any) -> None:
  """Raises UserError where `datasets` would retry for half a minute."""
  if config.HF_HUB_OFFLINE or network.reaches(config.HF_ENDPOINT):
    return
  host = urllib.parse.urlsplit(config.HF_ENDPOINT).hostname
  raise UserError(
    f"hf:{source}: {host} can't be reached; {_download(source)}, or set"
    " HF_DATASETS_OFFLINE=1 to read what load_dataset has cached"
  )


def _download(source: Source) -> str:
  what = f"{source.name} --repo-type=dataset --local-dir=FOLDER"
  return f"run 'hf download {what}' where there is a network and read hf:FOLDER"


def _which_subset(source: Source, names: list[str]) -> str:
  if source.subset:
    what = f"unknown subset {source.subset!r}"
    return f"hf:{source}: {what}; {nearest(source.subset, names)}"
  return f"hf:{source} has several subsets; add ,subset= and one of " + (
    ", ".join(names)
  )


def _saved(folder: pathlib.Path) -> dict[str, list[str]]:
  """Returns {split: files} of what `save_to_disk` wrote, {} for other files."""
  parts = {TRAIN: folder}
  if (whole := folder / "dataset_dict.json").exists():
    parts = {n: folder / n for n in json.loads(whole.read_text())["splits"]}
  elif not (folder / "state.json").exists():
    return {}
  return {name: _arrow_files(part) for name, part in parts.items()}


def _arrow_files(folder: pathlib.Path) -> list[str]:
  listed = json.loads((folder / "state.json").read_text())["_data_files"]
  # Names only: a folder from somebody else names no file outside it.
  return [str(folder / pathlib.Path(f["filename"]).name) for f in listed]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
  """Turns whatever `datasets` raises into one line about a file or dataset."""
  try:
    yield
  except UserError:
    raise
  except StopIteration as error:
    raise UserError(f"{what}: its first file is empty") from error
  except Exception as error:
    reason = f"{type(error).__name__}: {first_line(error)}"
    raise UserError(f"{what} can't be read: {reason}") from error
