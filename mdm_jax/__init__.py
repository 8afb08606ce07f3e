"""Masked diffusion language models in JAX: train, measure and sample.

What a program needs, each imported when it is first used:

  load      a trained model out of a run's folder: `mdm_jax.sample.load`
  generate  texts from a model: `mdm_jax.sample.Model.generate`
  score     the likelihood of texts, or a bound: `mdm_jax.sample.Model.score`
  train     a config to an evaluated model:
            `mdm_jax.training_loop.train_and_evaluate`

Example:
  model = mdm_jax.load("runs/quickstart")
  model.generate("We the [MASK:3] of", num_samples=2).texts
  model.score("We the people of the United States.").bits_per_byte
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mdm_jax.sample import Model as _Model
  from mdm_jax.sample import load
  from mdm_jax.training_loop import train_and_evaluate as train

  generate, score = _Model.generate, _Model.score

__all__ = ["generate", "load", "score", "train"]
__version__ = "0.2.0"

_FOUND_IN = {
  "generate": "mdm_jax.sample:Model.generate",
  "load": "mdm_jax.sample:load",
  "score": "mdm_jax.sample:Model.score",
  "train": "mdm_jax.training_loop:train_and_evaluate",
}


def __getattr__(name: str) -> Any:
  """Imports one of the names above (PEP 562)."""
  # Late: `import mdm_jax` alone must stay fast, and these load JAX.
  if name not in _FOUND_IN:
    raise AttributeError(f"module 'mdm_jax' has no attribute {name!r}")
  return pkgutil.resolve_name(_FOUND_IN[name])


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
