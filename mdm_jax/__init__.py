"""Masked diffusion language models in JAX: train, measure and sample."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from mdm_jax.sample import Model

__version__ = "0.2.0"


def load(workdir: str, step: int | None = None) -> "Model":
  """Returns the model of a run's folder, ready to draw texts.

  >>> model = mdm_jax.load("runs/quickstart")
  >>> model.generate("We the [MASK:3] of", num_samples=2).texts

  Args:
    workdir: the folder.
    step: of the checkpoint (None: the best one).

  Raises:
    UserError: there is no run, no such checkpoint, or it can't be read.
  """
  # Imported here: `import mdm_jax` alone takes no time.
  from mdm_jax import sample

  return sample.load(workdir, step)
