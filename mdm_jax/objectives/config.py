"""Config sections `objective` and `noise`, and the registry of objectives.

An objective registers the fields that it adds to `objective` and to a stage,
with a function that builds it from them:

  OBJECTIVES.register("mine", Kind(MyConfig, MyStage, build))

A config file shows the fields of all registered objectives side by side; only
those of the chosen one may be set (`mdm_jax/config_forms.py`).
"""

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import SHARE, SIZE, field, fixed
from mdm_jax.core.registry import Registry
from mdm_jax.data.config import ObjectiveStage
from mdm_jax.objectives.measured import Chart

_NARROWEST = 1e-6  # below this, float32 can't draw distinct mask rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
  """The noise schedule alpha(t), used where rates come from t ~ U(0, 1)."""

  schedule: str = fixed(
    "linear",
    "shape of alpha(t), from 1 at t=0 to 0 at t=1",
    registry="mdm_jax.objectives.noise:SCHEDULES",
  )
  exponent: float = fixed(
    2.0, "exponent of the polynomial schedule 1 - t**exponent", "[0.01, 100]"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """What a training step minimises; the rest is the chosen objective's."""

  name: str = fixed(
    "masked",
    "training objective",
    registry="mdm_jax.objectives.config:OBJECTIVES",
  )

  def check_stage(self, stage: ObjectiveStage, path: str) -> None:
    """Checks a stage against these settings.

    Args:
      stage: the objective's fields of the stage.
      path: where the stage is in the config, such as "stages[0]".

    Raises:
      UserError: the two contradict each other.
    """

  def warnings(self, stages: Sequence[ObjectiveStage]) -> list[str]:
    """Returns warnings about the stages taken together, one sentence each."""
    del stages
    return []


@dataclasses.dataclass(frozen=True)
class Kind:
  """A registered objective: its config fields and its constructor.

  Attributes:
    config: the class of its section `objective`, a frozen dataclass with a
      default for every field.
    stage: the class of its fields in a stage, likewise. In both, a field that
      can be None must default to None.
    build: `(config, stage, noise, vocabulary, plan) -> Objective`, called once
      per stage; see `masked.build`. Also "module:function", imported on use.
    charts: the logged metrics that the report plots, by name.
    unused: paths of config fields outside `objective` that have no meaning
      with it: any value but the default is refused.
  """

  config: type[ObjectiveConfig]
  stage: type[ObjectiveStage]
  build: str | Callable[..., Any]
  charts: Mapping[str, Chart] = dataclasses.field(default_factory=dict)
  unused: tuple[str, ...] = ()


OBJECTIVES: Registry[Kind] = Registry("objective", "objective.name")


def build(config: ObjectiveConfig, *args: Any) -> Any:
  """Builds the configured objective for one stage; args as in `Kind.build`."""
  made = OBJECTIVES[config.name].build
  # By name, because the module of an objective imports this one.
  if isinstance(made, str):
    made = pkgutil.resolve_name(made)
  return made(config, *args)


def _label_smoothing() -> Any:
  # Of several objectives, which may differ in nothing but their defaults.
  return field(
    0.0, "of the training loss only; uniform over real tokens", "[0, 0.9]"
  )


# MARK: masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedConfig(ObjectiveConfig):
  """The masked objective: predict the masked tokens from the others."""

  weighting: Literal["masked_ce", "nelbo"] = fixed(
    "masked_ce",
    "masked_ce: mean cross-entropy over masked tokens; nelbo: unbiased"
    " estimate of the likelihood bound",
  )
  label_smoothing: float = _label_smoothing()

  def check_stage(self, stage: "MaskedStage", path: str) -> None:
    """Raises UserError if a stage never draws rates that the NELBO needs."""
    rates = stage.mask_rate
    covers = rates is None or rates == (0.0, 1.0) or stage.rehearsal > 0
    if self.weighting == "nelbo" and not covers:
      raise UserError(
        f"objective.weighting=nelbo, but {path}.mask_rate={rates} never"
        " draws the other rates, so no weight can make the bound unbiased; set"
        f" {path}.rehearsal > 0 or weighting=masked_ce"
      )

  def warnings(self, stages: Sequence["MaskedStage"]) -> list[str]:
    """Warns of mask rates that sampling needs but no stage trains on."""
    if any(s.mask_rate is None or s.rehearsal > 0 for s in stages):
      return []
    # Rehearsal or a noise schedule covers all rates, so only ranges are left.
    # Sweep them in order; `reached` is the end of what they cover so far.
    gaps, reached = [], 0.0
    for low, high in sorted(s.mask_rate for s in stages):
      if low > reached:
        gaps.append(f"{reached:.2f}-{low:.2f}")
      reached = max(reached, high)
    if reached < 1:
      gaps.append(f"{reached:.2f}-1.00")
    if not gaps:
      return []
    return [
      f"no stage trains on mask rates {', '.join(gaps)}, but sampling passes"
      " through them; set stages[i].rehearsal"
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedStage(ObjectiveStage):
  """How much of a row the stage masks."""

  mask_rate: tuple[float, float] | None = fixed(
    None,
    "range of each row's mask rate, drawn uniformly (None: by the noise"
    " schedule, from t ~ U(0, 1))",
    SHARE,
  )
  rehearsal: float = fixed(
    0.0, "fraction of rows whose mask rate is drawn from U(0, 1)", SHARE
  )
  opening: float = fixed(
    0.0,
    "fraction of the stage's updates during which attention opens from causal"
    " to bidirectional, for weights of a causal model (0: bidirectional from"
    " the first update)",
    SHARE,
  )

  def describe(self) -> str:
    """Returns the mask rates, for tables: "mask 0.05-0.2, 10% 0-1".

    The example masks 10 % of the rows at rates from all of 0-1 (rehearsal).
    """
    low, high = self.mask_rate or (0, 1)
    more = f", {self.rehearsal:.0%} 0-1" if self.rehearsal else ""
    if self.opening:
      more += f", opening {self.opening:.0%}"
    return f"mask {low:g}-{high:g}{more}"

  def masked_share(self) -> tuple[float, float]:
    """Returns the range of mask rates that the stage emphasizes."""
    return self.mask_rate or (0.0, 1.0)

  def check(self, path: str) -> None:
    """Raises UserError if the range is too narrow, or rehearsal has none."""
    rates = self.mask_rate
    if rates and not rates[1] - rates[0] >= _NARROWEST:
      raise UserError(
        f"{path}.mask_rate={rates} must be a range inside [0, 1], at least"
        f" {_NARROWEST:g} wide"
      )
    if rates is None and self.rehearsal:
      raise UserError(
        f"{path}.rehearsal={self.rehearsal} needs a mask_rate range;"
        " t ~ U(0, 1) covers every rate already"
      )


OBJECTIVES.register(
  "masked",
  Kind(
    MaskedConfig,
    MaskedStage,
    "mdm_jax.objectives.masked:build",
    {
      "train/loss": Chart("Training loss", "nats per masked token"),
      "validation/nelbo_per_token": Chart(
        "Validation NELBO", "nats per token", "validation/nelbo_stderr"
      ),
      "train/mask_rate": Chart("Mask rate", "mean over rows", low=0),
    },
  ),
)


# MARK: autoregressive


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(ObjectiveConfig):
  """The autoregressive objective: predict each token from those before it."""

  label_smoothing: float = _label_smoothing()
  input_mask_rate: tuple[float, float] = fixed(
    (0.0, 0.0),
    "range from which each row draws the share of its input tokens that are"
    " masked; in training only",
    SHARE,
  )

  def check(self, path: str) -> None:
    """Raises UserError if the range of input mask rates is reversed."""
    low, high = self.input_mask_rate
    if low > high:
      raise UserError(
        f"{path}.input_mask_rate=({low:g}, {high:g}) must be a range, the lower"
        f" rate first: ({high:g}, {low:g})"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveStage(ObjectiveStage):
  """Nothing to set: every token of a text is predicted."""

  def describe(self) -> str:
    """Returns what is predicted, for tables."""
    return "next token"


OBJECTIVES.register(
  "autoregressive",
  Kind(
    AutoregressiveConfig,
    AutoregressiveStage,
    "mdm_jax.objectives.autoregressive:build",
    {
      "train/loss": Chart("Training loss", "nats per token"),
      "validation/nll_per_token": Chart(
        "Validation NLL", "nats per token", "validation/nll_stderr"
      ),
    },
    unused=(
      *("noise.schedule", "noise.exponent", "model.time_conditioning"),
      # Inputs are shifted already.
      "model.shift_outputs",
    ),
  ),
)


# MARK: joint


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(MaskedConfig, AutoregressiveConfig):
  """A weighted sum of the masked and the autoregressive loss."""

  alpha: float = fixed(
    0.3, "weight of the autoregressive loss; the masked one has the rest", SHARE
  )
  primary: Literal["masked", "autoregressive"] = fixed(
    "masked", "which of the two selects the best checkpoint and draws samples"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointStage(MaskedStage):
  """The mask rates of the masked loss."""

  def describe(self) -> str:
    """Returns the mask rates and what else is predicted, for tables."""
    return f"{super().describe()} + next token"


OBJECTIVES.register(
  "joint",
  Kind(
    JointConfig,
    JointStage,
    "mdm_jax.objectives.joint:build",
    {
      "train/loss": Chart("Training loss", "nats, weighted sum of both"),
      "train/masked_loss": Chart("Masked loss", "nats per masked token"),
      "train/autoregressive_loss": Chart(
        "Autoregressive loss", "nats per token"
      ),
    },
    # The rows of the autoregressive loss have no mask rate, and shifted inputs.
    unused=("model.time_conditioning", "model.shift_outputs"),
  ),
)


# MARK: block


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(MaskedConfig):
  """Block diffusion: predict a block's masked tokens after clean blocks."""

  block_length: int = fixed(
    16,
    "tokens per block, counted from the start of each text; 1: autoregression;"
    " a row or more: masked diffusion",
    SIZE,
  )
  passes: Literal["two", "one"] = field(
    "two",
    "two: clean text is read first, and masked blocks attend to its keys and"
    " values; one: both are read side by side, in rows of twice the length",
  )

  def warnings(self, stages: Sequence["BlockStage"]) -> list[str]:
    """Warns of a last stage that makes the model one of other blocks."""
    found = super().warnings(stages)
    last = stages[-1].block_length or self.block_length
    if last != self.block_length:
      found.append(
        f"stages[{len(stages) - 1}].block_length={last} is not"
        f" objective.block_length={self.block_length}: evaluations and samples"
        f" have blocks of {last} tokens, as the last stage"
      )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStage(MaskedStage):
  """How long the stage's blocks are, and how much of a block it masks."""

  block_length: int | None = fixed(
    None,
    "tokens per block in this stage, to grow blocks from stage to stage (None:"
    " objective.block_length)",
    SIZE,
  )

  def describe(self) -> str:
    """Returns the mask rates of the blocks, for tables."""
    size = f" of {self.block_length}" if self.block_length else ""
    return f"{super().describe()} by block{size}"

  def check(self, path: str) -> None:
    """Raises UserError at `opening`, besides what the base class refuses."""
    super().check(path)
    if self.opening:
      raise UserError(
        f"{path}.opening={self.opening} has no effect on block diffusion, whose"
        f" blocks grow by {path}.block_length; set {path}.opening=0.0"
      )


OBJECTIVES.register(
  "block",
  Kind(
    BlockConfig,
    BlockStage,
    "mdm_jax.objectives.block:build",
    {
      "train/loss": Chart("Training loss", "nats per masked token"),
      "validation/nelbo_per_token": Chart(
        "Validation NELBO", "nats per token", "validation/nelbo_stderr"
      ),
      "train/mask_rate": Chart("Mask rate", "mean over blocks", low=0),
    },
    # A row has a rate for each of its blocks.
    unused=("model.time_conditioning",),
  ),
)
