"""Which values of the configuration can work, alone and together."""

import math
import re
from typing import Any

from mdm_jax.core.errors import UserError


def check(c: Any) -> None:
  """Raises UserError, naming the field, for a value that can't work."""
  _positive(
    c,
    ("data.batch_size", "model.num_layers", "model.embed_dim")
    + ("model.num_heads", "optimizer.accumulation", "optimizer.learning_rate")
    + ("train.log_every", "train.checkpoint_every", "train.keep_latest")
    + ("train.keep_every", "train.max_skipped")
    + ("train.recheck_every",)
    + ("train.spike_sigmas", "train.max_attempts", "train.restore_step")
    + ("eval.rows", "eval.masks_per_row", "eval.batch_size")
    + ("sample.num_samples", "sample.num_steps", "sample.temperature")
    + ("tokenizer.vocab_size", "noise.exponent", "optimizer.clip_norm")
    + ("data.max_documents", "model.num_kv_heads", "model.mlp_dim")
    + ("eval.final_rows", "sample.length", "sample.top_k")
    + ("sample.block_length", "data.block_megabytes"),
  )
  _within(c, "data.eval_fraction", 0, 0.5)
  _within(c, "model.dropout", 0, 0.9)
  _within(c, "objective.label_smoothing", 0, 0.9)
  _within(c, "optimizer.min_lr_ratio", 0, 1)
  _within(c, "optimizer.ema_decay", 0, 1)
  _within(c, "optimizer.b1", 0, 1)
  _within(c, "optimizer.b2", 0, 1)
  _within(c, "optimizer.weight_decay", 0, math.inf)
  _within(c, "optimizer.warmup_steps", 0, math.inf)
  _within(c, "eval.every", 0, math.inf)
  _within(c, "train.checkpoint_minutes", 0, math.inf)
  _within(c, "train.watchdog_seconds", 0, math.inf)
  _within(c, "train.spike_window", 2, math.inf)
  _within(c, "eval.samples", 0, math.inf)
  update_ranges(c.train.skip_updates)
  _check_sample(c)
  if c.init_from and c.tokenizer.path:
    raise UserError(
      f"tokenizer.path={c.tokenizer.path!r} and init_from={c.init_from!r}: a"
      " run to start from brings its own tokenizer; give one of the two"
    )
  _check_model(c.model)
  if not c.stages:
    raise UserError("stages is empty; give at least one")
  for i, stage in enumerate(c.stages):
    _check_stage(c, i, stage)


def update_ranges(text: str) -> tuple[tuple[int, int], ...]:
  """Reads `train.skip_updates`: half-open ranges of updates, counted from 0.

  Raises:
    UserError: a part of it is not START:END with START < END.
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


def _check_sample(c: Any) -> None:
  for name in ("min_p", "top_p", "threshold", "remasking_rate"):
    if getattr(c.sample, name) is not None:
      _within(c, f"sample.{name}", 0, 1)
  _within(c, "sample.guidance", 0, math.inf)
  temperatures = c.sample.temperature_range
  if temperatures and not 0 < temperatures[0] <= temperatures[1]:
    raise UserError(
      f"sample.temperature_range={temperatures} must be positive and rise"
    )
  budgets = [n for n in ("entropy_bound", "threshold") if _given(c.sample, n)]
  if "entropy_bound" in budgets:
    _within(c, "sample.entropy_bound", 0, math.inf)
  if len(budgets) == 2:
    raise UserError(
      "sample.entropy_bound and sample.threshold both say how much a step"
      " reveals; set one of them to None"
    )
  other = _given(c.sample, "block_length") * ["block_length"] + budgets
  if other and c.sample.schedule != "linear":
    raise UserError(
      f"sample.schedule={c.sample.schedule} has no meaning beside"
      f" sample.{other[0]}; set sample.schedule=linear"
    )
  if budgets and c.sample.remasking != "none":
    raise UserError(
      f"sample.remasking={c.sample.remasking} needs a fixed number of tokens a"
      f" step; set sample.{budgets[0]}=None or sample.remasking=none"
    )


def _given(section: Any, name: str) -> bool:
  return getattr(section, name) is not None


def _check_model(m: Any) -> None:
  if m.embed_dim % m.num_heads:
    raise UserError(
      f"model.num_heads={m.num_heads} does not divide"
      f" model.embed_dim={m.embed_dim}"
    )
  if (m.embed_dim // m.num_heads) % 2:
    raise UserError(
      f"model.embed_dim / model.num_heads = {m.embed_dim // m.num_heads} is"
      " odd; rotary positions need an even head size"
    )
  if m.num_kv_heads and m.num_heads % m.num_kv_heads:
    raise UserError(
      f"model.num_kv_heads={m.num_kv_heads} does not divide"
      f" model.num_heads={m.num_heads}"
    )


def _check_stage(c: Any, i: int, stage: Any) -> None:
  for name in ("length", "epochs", "updates", "max_words", "lr_factor"):
    _positive(c, (f"stages[{i}].{name}",))
  _within(c, f"stages[{i}].rehearsal", 0, 1)
  _within(c, f"stages[{i}].easiest", 0, 1)
  rates = stage.mask_rate
  if rates and not 0 <= rates[0] < rates[1] <= 1:
    raise UserError(
      f"stages[{i}].mask_rate={rates} must be a range inside [0, 1]"
    )
  if rates is None and stage.rehearsal:
    raise UserError(
      f"stages[{i}].rehearsal={stage.rehearsal} needs a mask_rate range;"
      " t ~ U(0, 1) covers every rate already"
    )
  covers = rates is None or rates == (0.0, 1.0) or stage.rehearsal > 0
  if c.objective.weighting == "nelbo" and not covers:
    raise UserError(
      f"objective.weighting=nelbo, but stages[{i}].mask_rate={rates} never"
      " draws the other rates, so no weight can make the bound unbiased; set"
      f" stages[{i}].rehearsal > 0 or weighting=masked_ce"
    )


def _lookup(c: Any, path: str) -> Any:
  value = c
  for part in path.replace("]", "").replace("[", ".").split("."):
    value = value[int(part)] if part.isdigit() else getattr(value, part)
  return value


def _positive(c: Any, paths: tuple[str, ...]) -> None:
  for path in paths:
    value = _lookup(c, path)
    if value is not None and not value > 0:
      raise UserError(f"{path}={value} must be positive")


def _within(c: Any, path: str, low: int | float, high: int | float) -> None:
  if not low <= _lookup(c, path) <= high:
    raise UserError(f"{path}={_lookup(c, path)} must be in [{low}, {high}]")
