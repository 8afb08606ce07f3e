"""The models, mask rates and random rows that the benchmarks train on."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int32

from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.data.config import DataConfig, StageConfig
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import Rows, field
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import MaskedConfig, MaskedStage
from mdm_jax.objectives.noise import RateDistribution, stage_rates
from mdm_jax.training.config import OptimizerConfig, TrainConfig
from mdm_jax.training.trainer import Trainer

_UPDATES = 100_000  # so the learning rate stays near its peak
_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model and a batch.

  `vocab` is the number of text ids, without the special ones.
  """

  num_layers: int
  embed_dim: int
  num_heads: int
  vocab: int
  length: int
  batch: int
  dtype: str = "auto"
  attention: str = "auto"
  remat: str = "auto"
  dropout: float = 0.0
  label_smoothing: float = 0.0


def _recommended(length: int) -> Preset:
  return Preset(
    *(12, 768, 12, 8192, length, 64), dropout=0.1, label_smoothing=0.1
  )


PRESETS = {
  # Layers, width, heads, text ids, row length, rows.
  "char": Preset(6, 384, 6, 27, 256, 8),
  "bpe": Preset(6, 384, 6, 32_768, 256, 8),
  "gpt2": Preset(12, 768, 12, 50_257, 512, 8),
  "medium": Preset(24, 1024, 16, 50_257, 1024, 8),
  "tiny": Preset(1, 32, 2, 27, 16, 8),
  # The stages of configs/recommended.py, in larger batches.
  "recommended_1": _recommended(64),
  "recommended_2": _recommended(128),
  "recommended_3": _recommended(512),
}

# Distributions of a row's mask rate: r ~ U(0, 1); the stages of
# configs/recommended.py; and the last one without rehearsal.
RATES: dict[str, dict[str, Any]] = {
  "uniform": {},
  "stage_1": {"mask_rate": (0.75, 0.90), "rehearsal": 0.1},
  "stage_2": {"mask_rate": (0.40, 0.60), "rehearsal": 0.1},
  "stage_3": {"mask_rate": (0.05, 0.20), "rehearsal": 0.1},
  "stage_3_strict": {"mask_rate": (0.05, 0.20)},
}


class Numbers(Tokenizer):
  """A tokenizer whose ids stand for their own numbers.

  The rows are random, so there is no text.
  """

  kind = "numbers"

  def __init__(self, size: int):
    super().__init__(tuple(b"%d " % i for i in range(size)), b"")

  def encode_batch(self, texts) -> list[Int32[np.ndarray, "_"]]:
    return [np.array(text.split(), np.int32) for text in texts]


def make_config(
  preset: Preset, rates: str = "uniform", checkpoint_every: int = _UPDATES
) -> Config:
  """Returns the config of a run that is far longer than any benchmark.

  Args:
    preset: the model and the batch.
    rates: name in `RATES`.
    checkpoint_every: updates between checkpoints.
  """
  told = MaskedStage(**RATES[rates])
  stage = StageConfig(length=preset.length, updates=_UPDATES, objective=told)
  # Without all rates or rehearsal no weight makes the bound unbiased, and the
  # config would be refused.
  unbiased = told.mask_rate is None or told.rehearsal > 0
  return Config(
    name="benchmark",
    data=DataConfig(batch_size=preset.batch),
    model=ModelConfig(
      num_layers=preset.num_layers,
      embed_dim=preset.embed_dim,
      num_heads=preset.num_heads,
      dtype=preset.dtype,
      attention=preset.attention,
      remat=preset.remat,
      dropout=preset.dropout,
    ),
    objective=MaskedConfig(
      weighting="nelbo" if unbiased else "masked_ce",
      label_smoothing=preset.label_smoothing,
    ),
    stages=(stage,),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000),
    train=TrainConfig(checkpoint_every=checkpoint_every),
    eval=EvalConfig(every=0, batch_size=preset.batch, samples=0),
  )


def make_rows(preset: Preset, count: int = _ROWS) -> Rows:
  """Returns rows of random text ids, each filled by one text."""
  draw = np.random.default_rng(0)
  shape = count, preset.length
  dtype = field("tokens").dtype(Vocabulary.after_text(preset.vocab))
  tokens = draw.integers(0, preset.vocab, shape, dtype)
  return Rows(tokens, np.ones(shape, np.uint16))


def on_disk(rows: Rows, folder: epath.PathLike) -> Rows:
  """Writes rows as `data/prepared.py` does; returns them memory-mapped."""
  mapped = {}
  for name, array in rows.fields.items():
    path = epath.Path(folder) / f"stage_1.{name}.npy"
    np.save(path, array)
    mapped[name] = np.load(path, mmap_mode="r", allow_pickle=False)
  return Rows(**mapped)


@dataclasses.dataclass(frozen=True)
class Work:
  """A run to time, on the current mesh.

  Attributes:
    config: the run's config.
    trainer: makes its updates.
    rates: the distribution of a row's mask rate.
    batch: the rows of the first update, on the devices.
  """

  config: Config
  trainer: Trainer
  rates: RateDistribution
  batch: Batch

  @property
  def mask_id(self) -> int:
    """The id of MASK."""
    return self.trainer.data.tokenizer.vocab.mask

  @property
  def tokens(self) -> int:
    """Tokens per update."""
    return self.config.rows_per_update * self.config.stages[0].length

  @property
  def reads(self) -> tuple[tuple[int, int], ...]:
    """Queries and keys of a row: every way to train reads all of it, once."""
    length = self.config.stages[0].length
    return ((length, length),)

  @property
  def head_positions(self) -> int:
    """Positions per update that go through the head: the whole buffer."""
    stage = self.trainer.curriculum.stages[0]
    plan = self.trainer.plan(stage)
    asked = self.trainer.objective(stage).cost().asked
    return plan.accumulation * plan.shards * asked


def make_data(preset: Preset, rows: Rows) -> PreparedData:
  """Returns rows as a run's data; the same rows are held out."""
  counts = {"tokens": int(rows.tokens.size), "most_segments": 1}
  manifest = {"rows": {"stage_1": counts}}
  held = one_byte_a_token(rows)
  return PreparedData(Numbers(preset.vocab), (rows,), held, held, manifest)


def one_byte_a_token(rows: Rows) -> HeldOut:
  """Returns rows as held-out text, each segment a document of its own."""
  numbers = [np.unique(row[row > 0]) for row in rows.segments]
  row = np.repeat(np.arange(len(rows)), [len(found) for found in numbers])
  segment = np.concatenate(numbers).astype(np.int64)
  sizes = (rows.segments[row] == segment[:, None]).sum(axis=1)
  # In the order of ROW, SEGMENT, DOCUMENT, BYTES, PIECE.
  columns = row, segment, np.arange(len(row)), sizes, np.zeros_like(row)
  return HeldOut(rows, np.stack(columns, axis=1).astype(np.int64))


def make_work(
  config: Config, data: PreparedData, mesh: jax.sharding.Mesh
) -> Work:
  """Returns the run to time, with its first batch."""
  trainer = make_trainer(config, data, mesh)
  stage = trainer.curriculum.stages[0]
  rates = stage_rates(stage.config.objective, config.noise)
  return Work(config, trainer, rates, trainer.batch(stage, 0))
