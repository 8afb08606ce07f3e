"""Draws text from a masked diffusion model, in plain torch and transformers.

  model.generate(
    input_ids=ids, custom_generate=FOLDER, trust_remote_code=True, num_steps=32
  )

An exported model has this file as custom_generate/generate.py. It is the
sampler of mdm_jax: in each step an order gives masked positions a priority, a
schedule says how many are revealed, and each of these gets a token drawn from
its own distribution. Ids of `mask_token_id` in `input_ids` are holes to fill;
behind them the row is drawn up to its length.
"""

import math

import torch

_FEWEST = 5, 2  # the version of transformers that reads is_causal
_ROUND = 4096.0  # scores are rounded, so that rounding errors decide no order


@torch.no_grad()
def generate(
  model,
  input_ids=None,
  inputs=None,
  attention_mask=None,
  max_length=None,
  max_new_tokens=None,
  num_steps=None,
  order=None,
  schedule=None,
  temperature=None,
  top_k=None,
  min_p=None,
  top_p=None,
  num_return_sequences=1,
  seed=None,
  **_,
):
  """Returns ids [B, L]; a row that ends early is filled with padding.

  Args:
    model: a model of transformers, exported by mdm_jax.
    input_ids: prompts [B, P], all of one length (None: an empty one).
    inputs: the same under the name that `generate` gives it.
    attention_mask: must be all ones, if it is given.
    max_length: tokens per row L (None: what the model was sampled with).
    max_new_tokens: tokens behind the prompt, in place of `max_length`.
    num_steps: steps, each one call of the model.
    order: random, spread, left_to_right, confidence, margin or entropy.
    schedule: linear or cosine.
    temperature: divides the logits.
    top_k: keep this many of the most likely tokens; 0: all.
    min_p: drop tokens below this share of the highest probability; 0: none.
    top_p: keep the fewest most likely tokens that hold this share; 1: all.
    num_return_sequences: rows for each prompt.
    seed: of the draws (None: torch's own generator).
  """
  _check(model, attention_mask)
  config, device = model.config, model.device
  own = config.mdm_jax
  given = dict(own["sampler"])
  asked = {
    "num_steps": num_steps,
    "order": order,
    "schedule": schedule,
    "temperature": temperature,
    "top_k": top_k,
    "min_p": min_p,
    "top_p": top_p,
  }
  given |= {name: value for name, value in asked.items() if value is not None}
  prompt = input_ids if input_ids is not None else inputs
  if prompt is None:
    prompt = torch.zeros((1, 0), dtype=torch.long)
  prompt = prompt.to(device).repeat_interleave(num_return_sequences, dim=0)
  length = max_length or own["length"]
  if max_new_tokens is not None:
    length = prompt.shape[1] + max_new_tokens
  if length < prompt.shape[1]:
    raise ValueError(
      f"the prompt has {prompt.shape[1]} tokens, a row only {length}: give"
      " max_length"
    )
  draw = torch.Generator(device)
  draw.manual_seed(torch.seed() if seed is None else seed)
  return _Sampler(model, given, draw)(prompt, length)


def _check(model, attention_mask):
  import transformers

  version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
  if version < _FEWEST:
    raise RuntimeError(
      f"transformers {transformers.__version__} ignores is_causal=false; 5.2 or"
      " newer is needed"
    )
  if attention_mask is not None and not bool(attention_mask.all()):
    raise ValueError("padded prompts are not supported: give one at a time")


class _Sampler:
  """One call of `generate`."""

  def __init__(self, model, settings, draw):
    self.model, self.settings, self.draw = model, settings, draw
    config = model.config
    self.mask, self.pad = config.mask_token_id, config.pad_token_id
    self.end = getattr(config, "eos_token_id", None)
    self.shift = getattr(config, "shift_outputs", False)
    self.forbidden = config.mdm_jax["forbidden"]

  def __call__(self, prompt, length):
    rows = len(prompt)
    x = prompt.new_full((rows, length), self.mask)
    x[:, : prompt.shape[1]] = prompt
    masked = x == self.mask
    free, steps = masked.clone(), self.settings["num_steps"]
    ends = torch.full((rows,), length, device=x.device)
    table = _counts(self.settings["schedule"], steps, length).to(x.device)
    ways = 2 ** max(length - 1, 1).bit_length()
    shift = torch.randint(ways, (rows, 1), generator=self.draw, device=x.device)
    at = torch.arange(length, device=x.device)
    for i in range(steps):
      if not masked.any():
        break
      inside = at < ends[:, None]
      logits = self._logits(x, inside, free)
      left = masked.sum(1)
      total = (free & inside).sum(1)
      count = left - (total - table[i + 1][total])
      count = torch.minimum(torch.maximum(count, left.clamp(max=1)), left)
      ranks = self._ranks(logits, masked, shift, ways)
      chosen = masked & (ranks < count[:, None])
      x[chosen] = self._tokens(logits[chosen])
      masked &= ~chosen
      if self.end is not None:
        ended = chosen & (x == self.end)
        first = torch.where(ended, at + 1, length).min(1).values
        ends = torch.minimum(ends, first)
        behind = at >= ends[:, None]
        x[behind] = self.pad
        masked &= ~behind
    return x

  def _logits(self, x, inside, free):
    """Logits in float32 [B, L, V], -inf where a token is impossible."""
    found = self.model(
      input_ids=x, attention_mask=inside.long(), use_cache=False
    ).logits.float()
    if self.shift:
      found = torch.cat([found[:, :1], found[:, :-1]], dim=1)
    for first, past in self.forbidden:
      found[..., first:past] = -math.inf
    if self.end is not None:
      # In front of a given token, an end would cut it off.
      given = (~free & inside).flip(1).cumsum(1).flip(1) > 0
      found[..., self.end].masked_fill_(given, -math.inf)
    return found

  def _ranks(self, logits, masked, shift, ways):
    """The rank of each position, 0 for the first to reveal."""
    rows, length = masked.shape
    at = torch.arange(length, device=masked.device)
    spread = -_reversed((at + shift) % ways, ways).double()
    order = self.settings["order"]
    if order == "random":
      first = torch.rand(
        (rows, length), generator=self.draw, device=masked.device
      ).double()
    elif order == "spread":
      first = spread
    elif order == "left_to_right":
      first = -at.double().expand(rows, length)
    else:
      first = _scores(order, logits)
    # Sorted by the last key first: a stable sort keeps it among equals.
    where = spread.argsort(dim=1, descending=True, stable=True)
    for key in (first, masked.double()):
      again = key.gather(1, where).argsort(dim=1, descending=True, stable=True)
      where = where.gather(1, again)
    ranks = torch.empty_like(where)
    return ranks.scatter_(1, where, at.expand(rows, length))

  def _tokens(self, logits):
    """Draws a token for each of some positions [N, V]."""
    s = self.settings
    heat = min(max(s["temperature"], 1e-30), 1e30)
    # More likely tokens first, ties by the lower id.
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    scores = (values - values[:, :1]).double() / heat
    if s["top_k"]:
      scores[:, s["top_k"] :] = -math.inf
    if s["min_p"]:
      scores[scores < math.log(s["min_p"])] = -math.inf
    weights = scores.exp()
    if s["top_p"] is not None and s["top_p"] < 1:
      before = weights.cumsum(-1) - weights
      limit = max(s["top_p"], 1e-30) * weights.sum(-1, keepdim=True)
      weights = torch.where(before < limit, weights, 0.0)
    place = torch.multinomial(weights, 1, generator=self.draw)
    return ids.gather(1, place)[:, 0]


def _counts(schedule, steps, length):
  """How many of n tokens are revealed before a step [steps + 1, length + 1]."""
  shares = torch.arange(steps + 1, dtype=torch.float64) / steps
  if schedule == "cosine":
    shares = 1 - torch.cos(math.pi / 2 * shares)
    shares[-1] = 1
  elif schedule != "linear":
    raise ValueError(f"schedule={schedule}: linear or cosine")
  free = torch.arange(length + 1)
  counts = torch.floor(shares[:, None] * free + 1e-9).long()
  # No step is idle while there are enough tokens.
  for i in range(1, steps + 1):
    counts[i] = torch.maximum(counts[i], counts[i - 1] + 1)
  for i in range(steps, -1, -1):
    counts[i] = torch.minimum(counts[i], free - (steps - i))
  return torch.minimum(counts.clamp(min=0), free)


def _scores(order, logits):
  logs = logits.log_softmax(-1)
  if order == "entropy":
    parts = torch.where(logs > -math.inf, logs.exp() * logs, 0.0)
    found = parts.sum(-1)
  elif order in ("confidence", "margin"):
    first, second = logs.topk(2, dim=-1).values.exp().unbind(-1)
    found = first - second if order == "margin" else first
  else:
    raise ValueError(
      f"order={order}: random, spread, left_to_right, confidence, margin or"
      " entropy"
    )
  return (found * _ROUND).round().double()


def _reversed(numbers, ways):
  """Reverses the bits of numbers below `ways`, a power of two."""
  bits = ways.bit_length() - 1
  return sum(((numbers >> n) & 1) << (bits - 1 - n) for n in range(bits))
