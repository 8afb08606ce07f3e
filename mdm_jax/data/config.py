"""What text is read, and how it becomes rows."""

import dataclasses
from typing import Literal

from mdm_jax.core import languages
from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import COUNT, MANY, POSITIVE, SHARE, SIZE, field, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which text is read, and how it is split."""

  corpus: str = field(  # not fixed: a resume may find it elsewhere
    "sotu",
    "`sotu`, `python_docs`, `shakespeare`, `text:GLOB`, `tfds:NAME`, `hf:NAME`;"
    " with answers: `chat:PATH`, `task:NAME`; with hidden spans: `infill:` and"
    " any of the former",
  )
  batch_size: int = fixed(8, "rows per microbatch, over all devices", SIZE)
  eval_fraction: float = fixed(
    0.05, "fraction held out for validation, to select checkpoints", "[0, 0.5]"
  )
  test_fraction: float = fixed(
    0.05, "fraction held out for test, only for final results", "[0, 0.5]"
  )
  validation_corpus: str = field(
    "",
    "corpus used for validation ('': `hf:`'s own split, or a part of `corpus`)",
  )
  test_corpus: str = field(
    "", "corpus used for test ('': `hf:`'s own split, or a part of `corpus`)"
  )
  language: str = fixed(
    "en", "ISO 639-1 code of the text; for splitting sentences and readability"
  )
  document: Literal["auto", "file", "line"] = field(
    "auto", "one document per text file or per line of it (auto: file)"
  )
  text_key: str = field(
    "text",
    "key or column of the text in .jsonl, .csv, .parquet, `tfds:` and `hf:`",
  )
  chat_template: str = field(
    "",
    "folder or file with the template of `chat:` conversations; `plain` for"
    " none ('': the tokenizer's, if its folder has one)",
    path=True,
  )
  answer_length: int | None = fixed(
    None,
    "fill a text's last answer up to N tokens with end-of-text, and predict"
    " these too (None: one end-of-text, so that its length is known)",
    SIZE,
  )
  answer_fill: Literal["all", "random"] = fixed(
    "random",
    "fill training answers up to answer_length, or to a random length up to it",
  )
  holes: int = fixed(
    1,
    "`infill:`: most hidden spans of a text, or fewer, equally often",
    "[1, 64]",
  )
  hole_length: int = fixed(
    8,
    "most tokens of a hidden span; those of `infill:` have any number up to"
    " this, equally often",
    "[1, 256]",
  )
  untold_holes: float = fixed(
    0.5,
    "share of the hidden spans that are filled up to hole_length with an id"
    " without text, so that a model learns how long they are",
    "[0, 1]",
  )
  max_documents: int | None = fixed(
    None, "read only the first N documents (None: all)", MANY
  )
  on_bad_record: Literal["fail", "skip"] = field(
    "fail",
    "what to do at an unreadable file or line: stop, or count and skip it",
  )
  cache_dir: str = field(
    "", "folder of cached rows ('': $XDG_CACHE_HOME/mdm_jax)", path=True
  )
  prepared: str = field(
    "", "folder that --mode=prepare fills and training reads", path=True
  )
  block_megabytes: float = field(
    16.0, "megabytes of text per prepared shard", "(0, 1048576]"
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
    "sentencepiece is trained on the train split; gpt2 and huggingface are"
    " read from path",
    registry="mdm_jax.data.tokenizer:TOKENIZERS",
  )
  vocab_size: int = fixed(
    8192, "pieces of the SentencePiece model to train", SIZE
  )
  path: str = fixed(
    "",
    "SentencePiece .model file to use instead of training one; GPT-2's"
    " merges.txt for kind=gpt2; tokenizer.json for kind=huggingface",
    path=True,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveStage:
  """A stage's settings of the objective; subclasses add the fields."""

  def describe(self) -> str:
    """Returns the settings in a few words, for tables."""
    return ""

  def masked_share(self) -> tuple[float, float] | None:
    """Returns the lowest and highest mask rate, or None if there is none."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of the curriculum."""

  name: str = field("train", "shown in progress lines and logs")
  unit: Literal[
    "sentences", "pairs", "lines", "paragraphs", "conversations"
  ] = fixed(
    "paragraphs",
    "text unit: one sentence, two consecutive ones, one line, running text, or"
    " prompts with their answers (`chat:`, `task:`)",
  )
  length: int = fixed(512, "tokens per row", SIZE)
  easiest: float = fixed(
    1.0, "fraction of the units to keep, the easiest ones", SHARE
  )
  min_words: int = fixed(0, "minimum words of a unit", COUNT)
  max_words: int | None = fixed(None, "maximum words of a unit", POSITIVE)
  epochs: float = fixed(1.0, "passes over the stage's rows", "(0, 1e9]")
  updates: int | None = fixed(
    None, "optimizer updates instead of epochs (None: from epochs)", POSITIVE
  )
  # `flat`: config files write the objective's fields beside the stage's own.
  objective: ObjectiveStage | None = field(
    None, "settings of the objective (None: its defaults)", flat=True
  )
  lr_factor: float = field(
    1.0, "multiplies the peak learning rate of the stage", "(0, 1000]"
  )

  @property
  def reads_all(self) -> bool:
    """Whether the units are all documents as a whole, without a selection."""
    return self.unit in ("paragraphs", "conversations")

  def check(self, path: str) -> None:
    """Raises UserError if no text can satisfy the limits."""
    limits = {"easiest": 1.0, "min_words": 0, "max_words": None}
    for name, default in limits.items() if self.unit == "conversations" else ():
      if getattr(self, name) != default:
        raise UserError(
          f"{path}.{name}={getattr(self, name)} has no effect on"
          f" {path}.unit=conversations, which are read as a whole; set"
          f" {path}.{name}={default}"
        )
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
    init_from: run or hf:FOLDER whose tokenizer is reused ('': none).
    accumulation: microbatches per update; a stage needs rows for one update.
    modules: the user's modules that a process making rows has to import first.
  """

  data: DataConfig
  tokenizer: TokenizerConfig = TokenizerConfig()
  stages: tuple[StageConfig, ...] = (StageConfig(),)
  init_from: str = ""
  accumulation: int = 1
  modules: tuple[str, ...] = ()
