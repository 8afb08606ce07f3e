"""MDLM's model and training step in PyTorch, for comparison.

Written after Sahoo et al. 2024 (arXiv 2406.07524) and the public code of
kuleshov-group/mdlm, as its configs set up the language models. What costs time
or memory is the same:

- float32 parameters and residuals, products in bfloat16 by autocast
- queries, keys and values are one product; rotary embeddings rotate halves; a
  position attends to its whole row; a tanh-GELU MLP of 4 D with biases
- adaLN-zero on a time that is always 0 (their `time_conditioning=False`), still
  computed in every block
- an untied head, initialised to zero; logits [B, L, V] of all positions, the
  mask's included; the SUBS parameterization and its loss in float32
- antithetic times, a coin per token, log-linear noise
- clipping, AdamW, a parameter average

What they would write today, and is faster than theirs: PyTorch's own attention
for the package flash-attn, a `where` for the indexing by a boolean array that
waits for the device, fused AdamW, an average of all parameters in one call.

Imports PyTorch (extra `torch`), as no other module of the benchmarks does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils

from mdm_jax.benchmarks.workload import Preset

_TIME, _CONDITION = 256, 128  # features of the time, and what is made of them
_EPS = 1e-3  # of the time and of the noise
_EMA = 0.9999


class MDLM(nn.Module):
  """The denoiser; the mask's id is the last."""

  def __init__(self, preset: Preset):
    super().__init__()
    width, ids = preset.embed_dim, preset.vocab + 1
    self.mask_id = preset.vocab
    self.embedding = nn.Parameter(torch.empty(ids, width))
    nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))
    self.condition = nn.Sequential(
      nn.Linear(_TIME, _CONDITION), nn.SiLU(), nn.Linear(_CONDITION, _CONDITION)
    )
    self.blocks = nn.ModuleList(
      Block(width, preset.num_heads, preset.dropout)
      for _ in range(preset.num_layers)
    )
    self.norm = Norm(width)
    self.modulation = _zero(nn.Linear(_CONDITION, 2 * width))
    self.head = _zero(nn.Linear(width, ids))
    cos, sin = _rotary(preset.length, width // preset.num_heads)
    self.register_buffer("cos", cos, persistent=False)
    self.register_buffer("sin", sin, persistent=False)

  def forward(self, xt: Tensor) -> Tensor:
    """Returns logits [B, L, V] of masked tokens [B, L]."""
    x = self.embedding[xt]
    # The features of time 0: as many cosines as sines.
    time = x.new_ones(len(xt), _TIME)
    time[:, _TIME // 2 :] = 0
    condition = F.silu(self.condition(time))
    for block in self.blocks:
      x = block(x, condition, self.cos, self.sin)
    shift, scale = _modulation(self.modulation, condition, 2)
    return self.head(_modulate(self.norm(x), shift, scale))


class Block(nn.Module):
  """Attention and MLP, each with shift, scale and gate by the condition."""

  def __init__(self, width: int, num_heads: int, dropout: float):
    super().__init__()
    self.num_heads, self.dropout = num_heads, dropout
    self.norm_1, self.norm_2 = Norm(width), Norm(width)
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.out = nn.Linear(width, width, bias=False)
    self.mlp = nn.Sequential(
      nn.Linear(width, 4 * width),
      nn.GELU(approximate="tanh"),
      nn.Linear(4 * width, width),
    )
    self.modulation = _zero(nn.Linear(_CONDITION, 6 * width))

  def forward(
    self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor
  ) -> Tensor:
    a, b, c, d, e, f = _modulation(self.modulation, condition, 6)
    h = self._attention(_modulate(self.norm_1(x), a, b), cos, sin)
    x = x + c * F.dropout(h, self.dropout, self.training)
    h = self.mlp(_modulate(self.norm_2(x), d, e))
    return x + f * F.dropout(h, self.dropout, self.training)

  def _attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return self.out(mixed.transpose(1, 2).flatten(2))


class Norm(nn.Module):
  """Layer norm in float32, with a scale and without a bias."""

  def __init__(self, width: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))

  def forward(self, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), self.weight.shape, self.weight)


def _zero(linear: nn.Linear) -> nn.Linear:
  nn.init.zeros_(linear.weight)
  nn.init.zeros_(linear.bias)
  return linear


def _modulation(
  linear: nn.Linear, condition: Tensor, count: int
) -> tuple[Tensor, ...]:
  """Returns `count` arrays [B, 1, D]."""
  return linear(condition)[:, None].chunk(count, dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
  return x * (1 + scale) + shift


def _rotary(length: int, size: int) -> tuple[Tensor, Tensor]:
  frequency = 10_000.0 ** -(torch.arange(0, size, 2) / size)
  angles = torch.outer(torch.arange(length), frequency).repeat(1, 2)
  return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Rotates x [B, H, L, K] by its positions, in its own dtype."""
  low, high = x.chunk(2, dim=-1)
  turned = torch.cat([-high, low], dim=-1)
  return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


# MARK: the objective


def corrupt(x0: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
  """Returns masked tokens [B, L], and each row's time [B]."""
  rows = len(x0)
  # Antithetic: a random offset within each of B equal parts of (0, 1).
  u = torch.rand(rows, device=x0.device) + torch.arange(rows, device=x0.device)
  t = _EPS + (1 - _EPS) * u / rows
  masked = torch.rand(x0.shape, device=x0.device) < (1 - _EPS) * t[:, None]
  return torch.where(masked, mask_id, x0), t


def subs_loss(
  logits: Tensor, x0: Tensor, xt: Tensor, t: Tensor, mask_id: int
) -> Tensor:
  """Returns the NELBO in nats per token (Sahoo et al. 2024, eq. 10).

  SUBS: the mask has no probability, and a token that is not masked has
  probability 1, hence no loss. Log-linear noise has the weight 1 / t.

  Args:
    logits: [B, L, V], as the model returns them.
    x0: clean tokens [B, L].
    xt: masked tokens [B, L].
    t: time of each row [B].
    mask_id: the mask's id.
  """
  logits = logits.to(torch.float32, copy=True)
  logits[..., mask_id] = -torch.inf
  nll = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none")
  nll = torch.where(xt == mask_id, nll.view_as(x0), 0.0)
  return (nll / t[:, None]).mean()


# MARK: an update


class Update:
  """Training updates, all on one batch of random tokens.

  A call does not wait for the device; `block_until_ready` does, by the name
  that JAX's arrays have for it.

  Attributes:
    model: the denoiser.
    device: what it runs on: the first GPU, or the CPU if there is none.
    loss: of the last update, on the device.
  """

  def __init__(self, preset: Preset, compiled: bool = False):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    on_gpu = torch.cuda.is_available()
    self.device = torch.device("cuda" if on_gpu else "cpu")
    dtype = preset.dtype
    if dtype == "auto":
      dtype = "bfloat16" if on_gpu else "float32"
    self._autocast = dtype == "bfloat16"
    self.model = MDLM(preset).to(self.device)
    shape = preset.batch, preset.length
    self._x0 = torch.randint(preset.vocab, shape, device=self.device)
    self._params = list(self.model.parameters())
    self._ema = [p.detach().clone() for p in self._params]
    # Fused: one kernel for all parameters, not some for each.
    self._optimizer = torch.optim.AdamW(
      self._params, lr=3e-4, weight_decay=0.0, fused=True
    )
    self._average = swa_utils.get_ema_multi_avg_fn(_EMA)
    self._loss = torch.compile(self.objective) if compiled else self.objective
    self.loss = torch.zeros((), device=self.device)

  def objective(self, x0: Tensor) -> Tensor:
    """Returns the loss of freshly masked tokens."""
    with torch.autocast(
      self.device.type, torch.bfloat16, enabled=self._autocast
    ):
      xt, t = corrupt(x0, self.model.mask_id)
      logits = self.model(xt)
      return subs_loss(logits, x0, xt, t, self.model.mask_id)

  def __call__(self) -> "Update":
    loss = self._loss(self._x0)
    loss.backward()
    nn.utils.clip_grad_norm_(self._params, 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad()
    self._average(self._ema, self._params, None)
    self.loss = loss.detach()
    return self

  def block_until_ready(self) -> None:
    """Waits for the device."""
    if self.device.type == "cuda":
      torch.cuda.synchronize()
