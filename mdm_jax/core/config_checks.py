"""Which values of the configuration can work, alone and together."""

import re
from typing import Any

from mdm_jax.core import fields, languages
from mdm_jax.core.errors import UserError

_NARROWEST = 1e-6  # range of mask rates that float32 can draw from
_MOST_ROWS = 2**24  # of an update, which are numbered one by one


def check(c: Any) -> None:
  """Raises UserError, naming the field, for a value that can't work."""
  fields.check(c)
  languages.check("data.language", c.data.language)
  if c.data.eval_fraction + c.data.test_fraction > 0.9:
    raise UserError(
      f"data.eval_fraction={c.data.eval_fraction} and data.test_fraction="
      f"{c.data.test_fraction} leave too little to train on; hold out at most"
      " 0.9 in all"
    )
  update_ranges(c.train.skip_updates)
  _check_sample(c)
  if c.init_from and c.tokenizer.path:
    raise UserError(
      f"tokenizer.path={c.tokenizer.path!r} and init_from={c.init_from!r}: a"
      " run to start from brings its own tokenizer; give one of the two"
    )
  _check_model(c.model)
  rows = c.data.batch_size * c.optimizer.accumulation
  if rows > _MOST_ROWS:
    raise UserError(
      f"data.batch_size={c.data.batch_size} x"
      f" optimizer.accumulation={c.optimizer.accumulation} = {rows:,} rows an"
      f" update; at most {_MOST_ROWS:,}"
    )
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
  temperatures = c.sample.temperature_range
  if temperatures and not temperatures[0] <= temperatures[1]:
    raise UserError(f"sample.temperature_range={temperatures} must rise")
  budgets = [n for n in ("entropy_bound", "threshold") if _given(c.sample, n)]
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
  rates = stage.mask_rate
  if rates and not rates[1] - rates[0] >= _NARROWEST:
    raise UserError(
      f"stages[{i}].mask_rate={rates} must be a range inside [0, 1], at least"
      f" {_NARROWEST:g} wide"
    )
  if stage.max_words is not None and stage.max_words < stage.min_words:
    raise UserError(
      f"stages[{i}].min_words={stage.min_words} is more than"
      f" stages[{i}].max_words={stage.max_words}: no text is left"
    )
  rate = c.optimizer.learning_rate * stage.lr_factor
  decay = rate * c.optimizer.weight_decay
  if rate > 1 or decay > 1:
    raise UserError(
      f"optimizer.learning_rate={c.optimizer.learning_rate:g} x"
      f" stages[{i}].lr_factor={stage.lr_factor:g} ="
      f" {rate:g}, and {decay:g} with"
      f" optimizer.weight_decay={c.optimizer.weight_decay:g}: both products"
      " must be in (0, 1]; more would overshoot every update"
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
