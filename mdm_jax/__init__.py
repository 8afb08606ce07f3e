"""Masked diffusion language models in JAX: train, measure and sample."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from mdm_jax.sample import Model

__version__ = "0.2.0"


def load(workdir: str, step: int | None = None) -> "Model":
  """Loads a trained model from a run's folder.

  Example:
    >>> model = mdm_jax.load("runs/quickstart")
    >>> model.generate("We the [MASK:3] of", num_samples=2).texts

  Args:
    workdir: the run's folder; `~` is the home folder.
    step: update of the checkpoint (None: the best checkpoint).

  Returns:
    The model, ready to sample from; see `mdm_jax.sample.Model`.

  Raises:
    UserError: there is no run, no such checkpoint, or it can't be read.
  """
  # Imported here: `import mdm_jax` alone must stay fast, and this loads JAX.
  from mdm_jax import sample

  return sample.load(workdir, step)
