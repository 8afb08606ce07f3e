"""The config of a run: frozen dataclasses, and how files and flags become one.

Every package defines its own section (`data/config.py`, `model/config.py`,
...); `Config` combines them. A config file starts from `default_config()`, a
locked `ConfigDict` with the same field names, and changes fields of it;
`from_config_dict` turns the result into validated dataclasses. A `ConfigDict`
never goes below the programs.

Every objective has its own fields, of the run and of each stage
(`objectives/config.py`). Files and flags use one form that has the fields of
all objectives, None where not given; `from_dict` keeps the chosen objective's
and refuses those of others.
"""

import dataclasses
import functools
import json
from typing import Any

from ml_collections import config_dict

from mdm_jax.core import coercion, fields
from mdm_jax.core import modules as own_modules
from mdm_jax.core.config_arguments import apply_arg as apply_arg
from mdm_jax.core.config_arguments import quick as quick
from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import field, fixed
from mdm_jax.core.sharding import MeshConfig
from mdm_jax.data import chat
from mdm_jax.data.config import (
  DataConfig,
  RowsConfig,
  StageConfig,
  TokenizerConfig,
)
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.model.config import LoraConfig, ModelConfig
from mdm_jax.objectives.config import (
  OBJECTIVES,
  MaskedConfig,
  NoiseConfig,
  ObjectiveConfig,
)
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.training.config import OptimizerConfig, TrainConfig

_MOST_ROWS = 2**24  # per update, where each row has its own number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything a run depends on."""

  name: str = field("run", "the run's name; workdir defaults to runs/<name>")
  seed: int = fixed(
    0, "seed of all random numbers of the training", "[0, 4294967295]"
  )
  init_from: str = field(
    "",
    "a run's folder or hf:FOLDER to start from: its parameters and tokenizer",
    path=True,
  )
  modules: tuple[str, ...] = field(
    (), "Python modules to import first, which register your own components"
  )
  data: DataConfig = DataConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  model: ModelConfig = ModelConfig()
  noise: NoiseConfig = NoiseConfig()
  objective: ObjectiveConfig = MaskedConfig()
  stages: tuple[StageConfig, ...] = (StageConfig(),)
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    # First: the registry look-ups below need the names that these register.
    own_modules.check_loaded(self.modules)
    kind = OBJECTIVES[self.objective.name]
    stages = tuple(
      s if s.objective else dataclasses.replace(s, objective=kind.stage())
      for s in self.stages
    )
    # The dataclass is frozen.
    object.__setattr__(self, "stages", stages)
    fields.check(self)

  def without_lora(self) -> "Config":
    """Returns the config of the same model with LoRA merged into it."""
    model = dataclasses.replace(self.model, lora=LoraConfig())
    return dataclasses.replace(self, model=model)

  def check(self, path: str) -> None:
    """Raises UserError if sections contradict each other."""
    del path  # this is the top
    if self.model.lora.rank and not self.init_from:
      raise UserError(
        f"model.lora.rank={self.model.lora.rank} needs init_from, the model"
        " that LoRA adds to; nearest valid: model.lora.rank=0"
      )
    if self.init_from and self.tokenizer.path:
      raise UserError(
        f"tokenizer.path={self.tokenizer.path!r} and init_from="
        f"{self.init_from!r}: the model in init_from already has a tokenizer;"
        " set only one of the two"
      )
    if self.rows_per_update > _MOST_ROWS:
      raise UserError(
        f"data.batch_size={self.data.batch_size} x"
        f" optimizer.accumulation={self.optimizer.accumulation} ="
        f" {self.rows_per_update:,} rows per update; at most {_MOST_ROWS:,}"
      )
    if not self.stages:
      raise UserError("stages is empty; at least one is needed")
    self._check_unused()
    for i, part in enumerate(self.stages):
      self._check_rates(part, f"stages[{i}]")
      self._check_objective(part, f"stages[{i}]")

  def _check_unused(self) -> None:
    """Raises UserError if a setting has no meaning with the objective."""
    name = self.objective.name
    for path in OBJECTIVES[name].unused:
      section, field_name = path.split(".")
      part = getattr(self, section)
      value, default = (getattr(x, field_name) for x in (part, type(part)()))
      if value != default:
        raise UserError(
          f"{path}={value!r} has no meaning with objective.name={name}; set"
          f" {path}={default!r}"
        )

  def _check_rates(self, part: StageConfig, path: str) -> None:
    """Raises UserError if a learning rate, or its decay, exceeds 1."""
    rate = self.optimizer.learning_rate * part.lr_factor
    # Decoupled weight decay multiplies parameters by 1 - decay; past 1 it would
    # flip their signs.
    decay = rate * self.optimizer.weight_decay
    if rate > 1 or decay > 1:
      raise UserError(
        f"optimizer.learning_rate={self.optimizer.learning_rate:g} x"
        f" {path}.lr_factor={part.lr_factor:g} = {rate:g}, and {decay:g} with"
        f" optimizer.weight_decay={self.optimizer.weight_decay:g}: both"
        " products must be in (0, 1]; larger ones overshoot in every update"
      )

  def _check_objective(self, part: StageConfig, path: str) -> None:
    kind, name = OBJECTIVES[self.objective.name], self.objective.name
    for given, wanted in (
      (self.objective, kind.config),
      (part.objective, kind.stage),
    ):
      # Files and flags always get the right class: this is for callers.
      if type(given) is not wanted:
        raise UserError(
          f"objective.name={name} takes a {wanted.__name__}, not a"
          f" {type(given).__name__}"
        )
    self.objective.check_stage(part.objective, path)

  @property
  def rows_per_update(self) -> int:
    """Rows per optimizer update: the effective batch size."""
    return self.data.batch_size * self.optimizer.accumulation

  @property
  def rows(self) -> RowsConfig:
    """Everything that the prepared rows depend on."""
    return RowsConfig(
      data=chat.settle(self.data, self.tokenizer, self.init_from),
      tokenizer=self.tokenizer,
      stages=self.stages,
      init_from=self.init_from,
      accumulation=self.optimizer.accumulation,
      modules=self.modules,
    )

  @property
  def sample_length(self) -> int:
    """Tokens per sample: `sample.length`, or else the last stage's length."""
    return self.sample.length or self.stages[-1].length


# MARK: from and to other forms


def form() -> type:
  """Returns the config's class as files and flags write it.

  It has the fields of all registered objectives, None where not given.
  """
  # By what is registered now: modules may have added objectives.
  kinds = {name: OBJECTIVES[name] for name in OBJECTIVES}
  return _form(tuple((n, k.config, k.stage) for n, k in kinds.items()))


@functools.lru_cache(maxsize=4)
def _form(kinds: tuple[tuple[str, type, type], ...]) -> type:
  # Kept: making the classes takes twice as long as filling them.
  objective = coercion.union(
    ObjectiveConfig, {name: config for name, config, _ in kinds}
  )
  part = coercion.union(StageConfig, {name: stage for name, _, stage in kinds})
  types = {
    "objective": (objective, objective()),
    "stages": (tuple[part, ...], (part(),)),
  }
  return coercion.with_types(Config, types)


def default_config(*modules: str) -> config_dict.ConfigDict:
  """Returns a ConfigDict of all fields at their defaults.

  It is locked: a misspelled field in a config file raises an error.

  Example:
    def get_config(arg: str = ""):
      config = default_config()
      config.model.num_layers = 12
      return apply_arg(config, arg)

  Args:
    *modules: Python modules of your own to import first; an objective that they
      register adds its fields.
  """
  own_modules.load(modules)
  return coercion.to_config_dict(form()(modules=modules))


def stage(**fields: Any) -> config_dict.ConfigDict:
  """Returns one stage for a config file's `config.stages` tuple.

  Example:
    config.stages = (stage(length=128, updates=200, mask_rate=(0.4, 0.6)),)

  Args:
    **fields: the stage's fields that differ from their defaults.
  """
  part = type(form()().stages[0])
  return coercion.to_config_dict(coercion.coerce(fields, part, "stages[.]"))


def to_config_dict(config: Config) -> config_dict.ConfigDict:
  """Returns a config in the form that config files build."""
  return coercion.to_config_dict(coercion.coerce(to_dict(config), form(), ""))


def from_config_dict(config: config_dict.ConfigDict) -> Config:
  """Returns the validated config that a config file has built.

  Raises:
    UserError: see `from_dict`.
  """
  # Through JSON, so that a file and a saved config take the same path.
  return from_dict(json.loads(config.to_json()))


def from_dict(raw: Any) -> Config:
  """Returns the validated config of plain JSON values.

  Raises:
    UserError: a name or type is wrong, a value is invalid, a field belongs to
      another objective, or a module of `modules` was not imported before.
  """
  if isinstance(raw, dict) and isinstance(raw.get("modules"), list):
    own_modules.check_loaded(map(str, raw["modules"]))  # they may add fields
  written = coercion.coerce(raw, form(), "")
  kind = OBJECTIVES[written.objective.name]
  parts = []
  for i, part in enumerate(written.stages):
    chosen = _owned(part, kind.stage, f"stages[{i}]", written)
    own = {n: getattr(part, n) for n in _STAGE_FIELDS}
    parts.append(StageConfig(**own, objective=chosen))
  values = {f.name: getattr(written, f.name) for f in _fields(Config)}
  values["objective"] = _owned(
    written.objective, kind.config, "objective", written
  )
  return Config(**values | {"stages": tuple(parts)})


def to_dict(config: Config) -> dict[str, Any]:
  """Returns a config as plain JSON values; `from_dict` is the inverse."""
  raw = json.loads(json.dumps(dataclasses.asdict(config)))
  # In files an objective's fields stand directly in the stage.
  for part in raw["stages"]:
    part |= part.pop("objective")
  return raw


def _owned(written: Any, cls: type, path: str, whole: Any) -> Any:
  """Returns the chosen objective's fields of a section.

  Raises:
    UserError: a field of another objective is given.
  """
  names = [f.name for f in _fields(cls)]
  given = {}
  for at in _fields(written):
    value, owners = getattr(written, at.name), at.metadata.get("of")
    if at.name in names:
      # In an objective's field, None means not given: its default applies.
      given |= {} if value is None and owners else {at.name: value}
    elif owners and value is not None:
      raise UserError(
        f"{path}.{at.name}={value!r} belongs to objective.name="
        f"{' or '.join(owners)}; this run has {whole.objective.name}"
      )
  return cls(**given)


_fields = dataclasses.fields
_STAGE_FIELDS = [f.name for f in _fields(StageConfig) if f.name != "objective"]
