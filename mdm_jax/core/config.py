"""The configuration: frozen dataclasses, and the way in from a config file.

The dataclasses here and in `core/learning_config.py` are the only definition of
what can be configured. A config file starts from `default_config()`, a locked
`ConfigDict` with the same names, and changes what it wants; `from_config_dict`
turns the result into validated dataclasses. Nothing below the programs ever
sees a `ConfigDict`.
"""

import dataclasses
import json
from typing import Any, Literal

from ml_collections import config_dict

from mdm_jax.core import coercion, config_checks
from mdm_jax.core.config_arguments import apply_arg as apply_arg
from mdm_jax.core.config_arguments import quick as quick
from mdm_jax.core.fields import COUNT, MANY, POSITIVE, SHARE, SIZE
from mdm_jax.core.fields import field as _field
from mdm_jax.core.fields import fixed as _fixed
from mdm_jax.core.learning_config import (
  MeshConfig,
  ModelConfig,
  NoiseConfig,
  ObjectiveConfig,
  OptimizerConfig,
)

Order = Literal[
  "random", "spread", "left_to_right", "confidence", "margin", "entropy"
]
Schedule = Literal["linear", "cosine", "optimal"]
Remasking = Literal["none", "cap", "rescale", "conf", "loop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which text, and how many rows of it a step sees."""

  corpus: str = _field(  # the same text may be elsewhere: rows are compared
    "sotu", "`sotu`, `python_docs`, `shakespeare`, `text:GLOB` or `tfds:NAME`"
  )
  batch_size: int = _fixed(8, "global rows a microbatch", SIZE)
  eval_fraction: float = _fixed(
    0.05,
    "share held out for validation, which chooses the best checkpoint",
    "[0, 0.5]",
  )
  test_fraction: float = _fixed(
    0.05,
    "share held out for the results, and used for nothing else",
    "[0, 0.5]",
  )
  validation_corpus: str = _field(
    "", "text for validation, as `corpus` ('': a share of the corpus)"
  )
  test_corpus: str = _field(
    "", "text for the results, as `corpus` ('': a share of the corpus)"
  )
  language: str = _fixed(
    "en", "of the text, by ISO 639-1: how sentences end, and readability"
  )
  document: Literal["auto", "file", "line"] = _field(
    "auto", "what a document is in text files; auto: the whole file"
  )
  text_key: str = _field(
    "text", "where the text is in a .jsonl, .csv, .parquet or `tfds:NAME`"
  )
  max_documents: int | None = _fixed(
    None, "read only the first N documents (None: all)", MANY
  )
  on_bad_record: Literal["fail", "skip"] = _field(
    "fail", "stop at a file or line that can't be read, or count and skip it"
  )
  cache_dir: str = _field(
    "", "where prepared rows are kept ('': $XDG_CACHE_HOME/mdm_jax)", path=True
  )
  prepared: str = _field(
    "", "folder of --mode=prepare; rows are read from it", path=True
  )
  block_megabytes: float = _field(
    16.0, "text a shard of --mode=prepare holds", "(0, 1048576]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes token ids."""

  kind: Literal["sentencepiece", "byte", "char"] = _fixed(
    "sentencepiece", "sentencepiece is trained on the train split"
  )
  vocab_size: int = _fixed(
    8192, "pieces of a SentencePiece model to train", SIZE
  )
  path: str = _fixed(
    "", "a given SentencePiece .model instead of training one", path=True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of the curriculum."""

  name: str = _field("train", "shown in progress lines and logs")
  unit: Literal["sentences", "pairs", "lines", "paragraphs"] = _fixed(
    "paragraphs",
    "text unit: one sentence, two consecutive ones, one line, or running text",
  )
  length: int = _fixed(512, "tokens a row", SIZE)
  easiest: float = _fixed(
    1.0, "share of the units kept, the least difficult first", SHARE
  )
  min_words: int = _fixed(0, "shorter units are left out", COUNT)
  max_words: int | None = _fixed(None, "longer units are left out", POSITIVE)
  epochs: float = _fixed(
    1.0, "passes over the rows selected for the stage", "(0, 1e9]"
  )
  updates: int | None = _fixed(
    None, "optimizer updates instead of epochs (None: from epochs)", POSITIVE
  )
  mask_rate: tuple[float, float] | None = _fixed(
    None,
    "each row's rate r ~ U(range) (None: t ~ U(0,1) through `noise`)",
    SHARE,
  )
  rehearsal: float = _fixed(
    0.0, "share of the rows whose rate is r ~ U(0, 1) instead", SHARE
  )
  lr_factor: float = _field(
    1.0, "multiplies the peak of the stage's cosine cycle", "(0, 1000]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How often the loop reports and saves, and what it does about faults."""

  log_every: int = _field(20, "updates between points in the logs", POSITIVE)
  checkpoint_every: int = _field(500, "updates between checkpoints", POSITIVE)
  checkpoint_minutes: float = _field(
    10.0,
    "save at the latest after so many minutes (0: by updates only)",
    "[0, 1e6]",
  )
  keep_latest: int = _field(
    2, "newest checkpoints kept, beside the best one", POSITIVE
  )
  keep_every: int | None = _field(
    None,
    "keep for good the checkpoints of updates divisible by this",
    POSITIVE,
  )
  restore_step: int | None = _field(
    None,
    "go on from this checkpoint, once, and set newer ones aside",
    POSITIVE,
  )
  skip_updates: str = _field(
    "", "updates passed over with their rows, as `1200:1500,1800:1810`"
  )
  max_skipped: int = _field(
    3,
    "updates in a row, not finite or spikes, that end the run unapplied",
    POSITIVE,
  )
  spike_sigmas: float | None = _field(
    None,
    "don't apply an update whose gradient norm is so far above the last"
    " ones' mean, in their deviations",
    "(0, 1e6]",
  )
  spike_window: int = _field(
    128, "applied updates that a spike is told by", "[2, 65536]"
  )
  recheck_every: int | None = _field(
    None,
    "make every so many updates one twice, and compare every bit",
    POSITIVE,
  )
  deterministic: Literal["auto", "true"] = _field(
    "auto",
    "the same bits in every run. auto: what costs nothing (kernels are chosen"
    " once and kept with the compiled programs; on a CPU that is all it takes);"
    " true: on a GPU XLA's deterministic kernels too, at some speed",
  )
  watchdog_seconds: float = _field(
    1200.0,
    "without progress, then all stacks are told and the run ends (0: never)",
    "0 or [1, 1e8]",
  )
  max_attempts: int = _field(
    3, "starts in a row that may die before they save anything new", POSITIVE
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """The held-out likelihood bound, and measures of samples."""

  every: int = _field(
    500,
    "updates between evaluations while training (0: only at the end)",
    COUNT,
  )
  rows: int = _field(
    128, "validation rows of an evaluation while training", POSITIVE
  )
  final_rows: int | None = _field(
    None, "test rows of the final evaluation (None: all)", POSITIVE
  )
  masks_per_row: int = _field(
    16, "stratified mask rates drawn for each row", "[1, 65536]"
  )
  batch_size: int = _field(64, "masked rows a call of the denoiser", SIZE)
  samples: int = _field(
    64, "texts drawn to measure repetition, diversity, grade (0: none)", COUNT
  )
  judge: str = _field(
    "",
    "folder of a Hugging Face causal LM that judges samples ('': an n-gram"
    " model of the training text)",
    path=True,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How text is drawn; a filter or limit that is None is off."""

  num_samples: int = _field(4, "texts", POSITIVE)
  length: int | None = _field(
    None, "tokens a text (None: the last stage's)", SIZE
  )
  num_steps: int = _field(
    20, "steps, one denoiser call each, at most", "[1, 65536]"
  )
  order: Order = _field("spread", "which masked tokens are revealed first")
  block_length: int | None = _field(
    None,
    "tokens of a block; each is finished before the next (None: one)",
    SIZE,
  )
  schedule: Schedule = _field(
    "linear",
    "tokens a step; optimal: the least divergence by the last evaluation's"
    " loss at every mask rate",
  )
  entropy_bound: float | None = _field(
    None,
    "nats; reveal more a step while the sum but its largest is in it",
    "[0, 1e6]",
  )
  threshold: float | None = _field(
    None,
    "reveal every token whose likeliest candidate has a probability above",
    SHARE,
  )
  remasking: Remasking = _field("none", "which revealed tokens are put back")
  remasking_rate: float = _field(
    0.05,
    "share of the revealed tokens that a step puts back, at most",
    SHARE,
  )
  guidance: float = _field(
    0.0,
    "weight of logits with the prompt over those without (0: one call)",
    "[0, 1000]",
  )
  temperature: float = _field(0.8, "divides the logits", "[1e-30, 1e30]")
  temperature_range: tuple[float, float] | None = _field(
    (0.3, 0.8),
    "the temperature is clamped to this, with a warning",
    "[1e-30, 1e30]",
  )
  top_k: int | None = _field(50, "keep the k likeliest tokens", POSITIVE)
  min_p: float | None = _field(
    None, "drop tokens below min_p times the likeliest's probability", SHARE
  )
  top_p: float | None = _field(
    0.9, "then the fewest that reach this mass", SHARE
  )
  seed: int = _field(0, "of the samples", "[0, 4294967295]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything a run depends on."""

  name: str = _field("run", "the run's name; workdir defaults to runs/<name>")
  seed: int = _fixed(
    0, "root of every random number of the training", "[0, 4294967295]"
  )
  init_from: str = _field(
    "",
    "folder of a run whose best parameters and tokenizer to start from",
    path=True,
  )
  data: DataConfig = DataConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  model: ModelConfig = ModelConfig()
  noise: NoiseConfig = NoiseConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  stages: tuple[StageConfig, ...] = (StageConfig(),)
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    config_checks.check(self)

  @property
  def rows_per_update(self) -> int:
    """Rows an optimizer update sees: the effective batch."""
    return self.data.batch_size * self.optimizer.accumulation

  @property
  def sample_length(self) -> int:
    """Tokens of a sample."""
    return self.sample.length or self.stages[-1].length


# MARK: from and to other forms


def default_config() -> config_dict.ConfigDict:
  """Returns every field at its default, locked: a typo in a file fails."""
  return coercion.to_config_dict(Config())


def stage(**fields: Any) -> config_dict.ConfigDict:
  """Returns one stage for a config file's `config.stages` tuple."""
  return coercion.to_config_dict(from_dict(fields, StageConfig, "stages[.]"))


def from_config_dict(config: config_dict.ConfigDict) -> Config:
  """Returns the validated dataclasses for a config file's result."""
  return from_dict(json.loads(config.to_json()))


def from_dict(raw: Any, cls: type = Config, path: str = "") -> Any:
  """Builds `cls` from plain JSON values; a wrong name or type is named."""
  return coercion.coerce(raw, cls, path)


def to_dict(config: Any) -> dict[str, Any]:
  """Returns plain JSON values: lists, dicts, numbers and strings."""
  return json.loads(json.dumps(dataclasses.asdict(config)))
