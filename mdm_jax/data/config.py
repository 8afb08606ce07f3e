"""What text is read, and how it becomes rows."""

import dataclasses
from typing import Literal

from mdm_jax.core import languages
from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import COUNT, MANY, POSITIVE, SHARE, SIZE, field, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which text, and how many rows of it a step sees."""

  corpus: str = field(  # not fixed: a resume may find it elsewhere
    "sotu", "`sotu`, `python_docs`, `shakespeare`, `text:GLOB` or `tfds:NAME`"
  )
  batch_size: int = fixed(8, "global rows a microbatch", SIZE)
  eval_fraction: float = fixed(
    0.05,
    "share held out for validation, which chooses the best checkpoint",
    "[0, 0.5]",
  )
  test_fraction: float = fixed(
    0.05,
    "share held out for the results, and used for nothing else",
    "[0, 0.5]",
  )
  validation_corpus: str = field(
    "", "text for validation, as `corpus` ('': a share of the corpus)"
  )
  test_corpus: str = field(
    "", "text for the results, as `corpus` ('': a share of the corpus)"
  )
  language: str = fixed(
    "en", "of the text, by ISO 639-1: how sentences end, and readability"
  )
  document: Literal["auto", "file", "line"] = field(
    "auto", "what a document is in text files; auto: the whole file"
  )
  text_key: str = field(
    "text", "where the text is in a .jsonl, .csv, .parquet or `tfds:NAME`"
  )
  max_documents: int | None = fixed(
    None, "read only the first N documents (None: all)", MANY
  )
  on_bad_record: Literal["fail", "skip"] = field(
    "fail", "stop at a file or line that can't be read, or count and skip it"
  )
  cache_dir: str = field(
    "", "where prepared rows are kept ('': $XDG_CACHE_HOME/mdm_jax)", path=True
  )
  prepared: str = field(
    "", "folder of --mode=prepare; rows are read from it", path=True
  )
  block_megabytes: float = field(
    16.0, "Megabytes of text per prepared shard", "(0, 1048576]"
  )

  def check(self, path: str) -> None:
    """Raises UserError on an unknown language or too little training text."""
    languages.check(f"{path}.language", self.language)
    if self.eval_fraction + self.test_fraction > 0.9:
      raise UserError(
        f"{path}.eval_fraction={self.eval_fraction} and {path}.test_fraction="
        f"{self.test_fraction} leave too little to train on; hold out at most"
        " 0.9 in all"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes token ids."""

  kind: str = fixed(
    "sentencepiece",
    "sentencepiece is trained on the train split",
    registry="mdm_jax.data.tokenizer:TOKENIZERS",
  )
  vocab_size: int = fixed(
    8192, "pieces of a SentencePiece model to train", SIZE
  )
  path: str = fixed(
    "", "a given SentencePiece .model instead of training one", path=True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveStage:
  """What a stage's config tells the objective; subclasses add the fields."""

  def describe(self) -> str:
    """Returns what the stage asks of the model, in a few words for tables."""
    return ""

  def masked_share(self) -> tuple[float, float] | None:
    """Returns the lowest and highest mask rate, or None if there is none."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of the curriculum."""

  name: str = field("train", "shown in progress lines and logs")
  unit: Literal["sentences", "pairs", "lines", "paragraphs"] = fixed(
    "paragraphs",
    "text unit: one sentence, two consecutive ones, one line, or running text",
  )
  length: int = fixed(512, "tokens a row", SIZE)
  easiest: float = fixed(
    1.0, "share of the units kept, the least difficult first", SHARE
  )
  min_words: int = fixed(0, "shorter units are left out", COUNT)
  max_words: int | None = fixed(None, "longer units are left out", POSITIVE)
  epochs: float = fixed(
    1.0, "passes over the rows selected for the stage", "(0, 1e9]"
  )
  updates: int | None = fixed(
    None, "optimizer updates instead of epochs (None: from epochs)", POSITIVE
  )
  # `flat`: config files write the objective's fields beside the stage's own.
  objective: ObjectiveStage | None = field(
    None, "what the objective is told (None: its defaults)", flat=True
  )
  lr_factor: float = field(
    1.0, "multiplies the peak of the stage's cosine cycle", "(0, 1000]"
  )

  def check(self, path: str) -> None:
    """Raises UserError if no text can satisfy both word limits."""
    if self.max_words is not None and self.max_words < self.min_words:
      raise UserError(
        f"{path}.min_words={self.min_words} is more than"
        f" {path}.max_words={self.max_words}: no text is left"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig:
  """The part of a run's config that its rows depend on.

  Attributes:
    data: which text.
    tokenizer: how text becomes ids.
    stages: units, limits and row length of each stage.
    init_from: workdir of the run whose tokenizer is reused ('': none).
    accumulation: microbatches per update; a stage needs rows for one update.
    modules: the user's modules that a process making rows has to import first.
  """

  data: DataConfig
  tokenizer: TokenizerConfig = TokenizerConfig()
  stages: tuple[StageConfig, ...] = (StageConfig(),)
  init_from: str = ""
  accumulation: int = 1
  modules: tuple[str, ...] = ()
