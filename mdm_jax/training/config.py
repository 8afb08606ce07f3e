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
    "adamw",
    "the optimizer's name",
    registry="mdm_jax.training.optimizer:OPTIMIZERS",
  )
  learning_rate: float = field(
    2e-4, "peak learning rate of a stage with lr_factor=1", "(0, 1]"
  )
  schedule: Literal["cosine_with_restarts"] = field(
    "cosine_with_restarts", "one cosine cycle per stage"
  )
  warmup_steps: int = field(
    1000,
    "updates of linear warm-up, once, at the start of the run",
    COUNT,
  )
  min_lr_ratio: float = field(
    0.1,
    "learning rate at the end of every cycle / its peak value (learning_rate)",
    SHARE,
  )
  weight_decay: float = field(
    0.1,
    "decoupled weight decay; norms, biases and embeddings have none",
    "[0, 1000]",
  )
  clip_norm: float = field(
    1.0,
    "gradients with a larger global norm are scaled down to this norm",
    "[1e-9, 1e9]",
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
    "decay of the averaged gradient: muon (None: 0.95), adafactor (None: no"
    " momentum)",
    "[0, 0.999999]",
  )
  accumulation: int = fixed(1, "microbatches per update", SIZE)
  every: int = fixed(
    1,
    "one optimizer step per this many updates, with their mean gradient"
    " (optax.MultiSteps)",
    SIZE,
  )
  ema_decay: float = field(
    0.9999,
    "decay of the averaged parameters, which are evaluated and sampled",
    SHARE,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How often the loop reports and saves, and what it does about faults."""

  log_every: int = field(20, "updates between log entries", POSITIVE)
  checkpoint_every: int = field(500, "updates between checkpoints", POSITIVE)
  checkpoint_minutes: float = field(
    10.0,
    "save at least every so many minutes (0: only by checkpoint_every)",
    "[0, 1e6]",
  )
  keep_latest: int = field(
    2, "number of newest checkpoints to keep, besides the best one", POSITIVE
  )
  keep_every: int | None = field(
    None,
    "also keep checkpoints of updates divisible by this, forever",
    POSITIVE,
  )
  restore_step: int | None = field(
    None,
    "resume once from this checkpoint, and move newer ones to set_aside/",
    POSITIVE,
  )
  skip_updates: str = field(
    "", "ranges of updates to skip with their rows, e.g. `1200:1500,1800:1810`"
  )
  max_skipped: int = field(
    3,
    "end the run after this many consecutive updates that were not finite or"
    " spikes, and so not applied",
    POSITIVE,
  )
  spike_sigmas: float | None = field(
    None,
    "skip an update whose gradient norm exceeds the mean of recent norms by"
    " this many standard deviations",
    "(0, 1e6]",
  )
  spike_window: int = field(
    128,
    "number of recent applied updates that spikes are compared with",
    "[2, 65536]",
  )
  recheck_every: int | None = field(
    None,
    "Every N updates, run one twice and require identical bits",
    POSITIVE,
  )
  deterministic: Literal["auto", "true"] = field(
    "auto",
    "identical bits in every run. auto: only what costs no speed (kernels are"
    " chosen once and stored with the compiled programs; enough on a CPU);"
    " true: on a GPU also XLA's deterministic kernels, which are slower",
  )
  watchdog_seconds: float = field(
    1200.0,
    "after so many seconds without progress, print all stacks and exit (0:"
    " never)",
    "0 or [1, 1e8]",
  )
  max_attempts: int = field(
    3,
    "end the run after this many consecutive attempts that died without"
    " saving anything new",
    POSITIVE,
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
        f"train.skip_updates={text!r}: {part!r} is not a range START:END"
        " with START < END; a valid value: '1200:1500,1800:1810'"
      )
    ranges.append((int(found[1]), int(found[2])))
  return tuple(ranges)
