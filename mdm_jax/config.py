"""The configuration: frozen dataclasses, and the way in from a config file.

Every room defines its own section (`data/config.py`, `model/config.py`, ...);
here they are put together. A config file starts from `default_config()`, a
locked `ConfigDict` with the same names, and changes what it wants;
`from_config_dict` turns the result into validated dataclasses. Nothing below
the programs ever sees a `ConfigDict`.
"""

import dataclasses
import json
from typing import Any

from ml_collections import config_dict

from mdm_jax.core import coercion, config_checks
from mdm_jax.core.config_arguments import apply_arg as apply_arg
from mdm_jax.core.config_arguments import quick as quick
from mdm_jax.core.fields import field, fixed
from mdm_jax.core.sharding import MeshConfig
from mdm_jax.data.config import (
  DataConfig,
  RowsConfig,
  StageConfig,
  TokenizerConfig,
)
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import NoiseConfig, ObjectiveConfig
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.training.config import OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything a run depends on."""

  name: str = field("run", "the run's name; workdir defaults to runs/<name>")
  seed: int = fixed(
    0, "root of every random number of the training", "[0, 4294967295]"
  )
  init_from: str = field(
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
  def rows(self) -> RowsConfig:
    """What the run's rows depend on."""
    return RowsConfig(
      data=self.data,
      tokenizer=self.tokenizer,
      stages=self.stages,
      init_from=self.init_from,
      accumulation=self.optimizer.accumulation,
    )

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
