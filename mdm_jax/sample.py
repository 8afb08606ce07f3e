"""From a checkpoint and a prompt to text."""

import jax

from mdm_jax.core.config import Config
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import make_mesh
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.tokenizer import load_tokenizer
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sampling.generate import TextSampler
from mdm_jax.training.checkpoint import Checkpoints


def sample_workdir(
  config: Config, workdir: Workdir, prompt: str = ""
) -> list[str]:
  """Draws texts from a run's best checkpoint, prints and returns them."""
  tokenizer = load_tokenizer(workdir.path)
  workdir.check_tokenizer(tokenizer.sha256)
  vocab = tokenizer.vocab
  denoiser = Denoiser(config.model, vocab.size, vocab.num_real)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh), Checkpoints(workdir.path) as checkpoints:
    _, params = checkpoints.restore_best_params(denoiser)
    sampler = TextSampler(
      config.sample, denoiser, tokenizer, mesh, config.sample_length
    )
    curve = (workdir.read_results() or {}).get("ce_by_mask_rate")
    texts = sampler(params, [prompt] * config.sample.num_samples, curve).texts
  for i, text in enumerate(texts, start=1):
    console.rule(f"sample {i}")
    console.print(text, markup=False, soft_wrap=True)
  return texts
