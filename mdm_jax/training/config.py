"""Config sections `optimizer` and `train`."""

import dataclasses
import re
from typing import Literal

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import COUNT, POSITIVE, SHARE, SIZE, field, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """An optimizer by name, warm-up, then one cosine cycle a stage."""

  name: str = fixed(
    "adamw", "the optimizer", registry="mdm_jax.training.optimizer:OPTIMIZERS"
  )
  learning_rate: float = field(2e-4, "peak of the first stage", "(0, 1]")
  schedule: Literal["cosine_with_restarts"] = field(
    "cosine_with_restarts", "one cosine cycle a stage"
  )
  warmup_steps: int = field(
    1000,
    "optimizer updates of linear warm-up, once, at the start of the run",
    COUNT,
  )
  min_lr_ratio: float = field(
    0.1, "floor of every cycle / learning_rate", SHARE
  )
  weight_decay: float = field(
    0.1, "decoupled; not on norms, biases and embeddings", "[0, 1000]"
  )
  clip_norm: float = field(
    1.0, "longest gradient; a longer one is scaled down to it", "[1e-9, 1e9]"
  )
  b1: float = field(
    0.9,
    "decay of the first moment: adamw, lion, muon (where it uses Adam)",
    "[0, 0.999999]",
  )
  b2: float | None = field(
    None,
    "decay of the second moment: adamw and muon (None: 0.95), of lion's"
    " momentum (None: 0.99)",
    "[0, 0.999999]",
  )
  eps: float = field(1e-8, "Adam's epsilon: adamw, muon", "[1e-30, 1]")
  momentum: float | None = field(
    None,
    "decay of the averaged gradient: muon (None: 0.95), adafactor (None: it"
    " has none)",
    "[0, 0.999999]",
  )
  accumulation: int = fixed(1, "microbatches an optimizer update", SIZE)
  every: int = fixed(
    1,
    "updates whose mean gradient makes one step of the optimizer"
    " (optax.MultiSteps); the others only accumulate",
    SIZE,
  )
  ema_decay: float = field(
    0.9999,
    "of the averaged parameters that are evaluated and sampled",
    SHARE,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How often the loop reports and saves, and what it does about faults."""

  log_every: int = field(20, "updates between points in the logs", POSITIVE)
  checkpoint_every: int = field(500, "updates between checkpoints", POSITIVE)
  checkpoint_minutes: float = field(
    10.0,
    "save at the latest after so many minutes (0: by updates only)",
    "[0, 1e6]",
  )
  keep_latest: int = field(
    2, "newest checkpoints kept, beside the best one", POSITIVE
  )
  keep_every: int | None = field(
    None,
    "keep for good the checkpoints of updates divisible by this",
    POSITIVE,
  )
  restore_step: int | None = field(
    None,
    "go on from this checkpoint, once, and set newer ones aside",
    POSITIVE,
  )
  skip_updates: str = field(
    "", "updates passed over with their rows, as `1200:1500,1800:1810`"
  )
  max_skipped: int = field(
    3,
    "updates in a row, not finite or spikes, that end the run unapplied",
    POSITIVE,
  )
  spike_sigmas: float | None = field(
    None,
    "don't apply an update whose gradient norm is so far above the last"
    " ones' mean, in their deviations",
    "(0, 1e6]",
  )
  spike_window: int = field(
    128, "applied updates that a spike is told by", "[2, 65536]"
  )
  recheck_every: int | None = field(
    None,
    "Every N updates, run one twice and require identical bits",
    POSITIVE,
  )
  deterministic: Literal["auto", "true"] = field(
    "auto",
    "the same bits in every run. auto: what costs nothing (kernels are chosen"
    " once and kept with the compiled programs; on a CPU that is all it takes);"
    " true: on a GPU XLA's deterministic kernels too, at some speed",
  )
  watchdog_seconds: float = field(
    1200.0,
    "without progress, then all stacks are told and the run ends (0: never)",
    "0 or [1, 1e8]",
  )
  max_attempts: int = field(
    3, "starts in a row that may die before they save anything new", POSITIVE
  )

  def check(self, path: str) -> None:
    """Raises UserError if `skip_updates` can't be read."""
    del path
    update_ranges(self.skip_updates)


def update_ranges(text: str) -> tuple[tuple[int, int], ...]:
  """Parses `train.skip_updates`, such as "1200:1500,1800:1810".

  Returns:
    Half-open ranges of updates, counted from 0.

  Raises:
    UserError: a part is not START:END with START < END.
  """
  ranges = []
  for part in text.split(",") if text else ():
    found = re.fullmatch(r"\s*([0-9]+):([0-9]+)\s*", part)
    if not found or int(found[1]) >= int(found[2]):
      raise UserError(
        f"train.skip_updates={text!r}: {part!r} is no range START:END with"
        " START < END; a valid one: '1200:1500,1800:1810'"
      )
    ranges.append((int(found[1]), int(found[2])))
  return tuple(ranges)
