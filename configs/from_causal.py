"""Turns a model of next tokens into a masked or block diffusion model.

  python -m mdm_jax.main --config=configs/from_causal.py
    --config.init_from=hf:FOLDER

FOLDER is a causal model of Hugging Face, or a .gguf file (docs/huggingface.md):
its weights, its sizes and its tokenizer are taken. A mask token is added if it
has none, and starts at the mean of the embeddings. Two choices differ between
the published conversions:

  which output predicts a masked token: the one at its own position, or with
  `:shifted` the one before it, which predicted it in the causal model;

  when attention becomes bidirectional: in the first update, or with `:gradual`
  little by little during the first tenth of the updates.

                   output      attention  learning rate, schedule
  DiffuLLaMA       shifted     gradual    3e-4 (GPT-2 medium), 1.5e-5 (7B)
  Dream            shifted     at once    -
  dLLM             own         at once    1e-4, cosine

DiffuLLaMA is Gong et al. 2024 (arXiv 2410.17891), Dream Ye et al. 2025 (arXiv
2508.15487), dLLM the repository ZHZisZZ/dllm. All keep the loss of the
likelihood bound, with weight 1/t; Dream reweighs its tokens.

With `:blocks` it becomes a block diffusion model (docs/blocks.md), whose blocks
grow from stage to stage, from 4 to 16 and 32 tokens, as in LLaDA2.0 (arXiv
2512.15745). With `:blocks,shifted`, blocks of one token would be the
causal model itself; Fast-dLLM v2 (arXiv 2509.26328) is shifted, SDAR is not.

By default the rates are dLLM's, the text is small, and an update has 4 rows of
128 tokens, so that a model of 135 million parameters can be converted on a CPU.

  from_causal.py:causal the objective of causal models, to compare
  from_causal.py:full   dLLM's sizes: 2048 rows of 1024 tokens, 10 epochs; needs
                        a text of your own in `data.corpus`; it was not trained
  from_causal.py:quick  any of them in 12 updates of short rows
"""

import functools

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; takes the words of the module's docstring."""
  words = arg.split(",")
  config = config_lib.default_config()
  config.name = "from_causal"
  config.init_from = "hf:models/SmolLM2-135M"
  config.data.update(corpus="sotu", batch_size=4)
  config.model.shift_outputs = "shifted" in words
  if "causal" in words:
    config.objective.name = "autoregressive"
  elif "blocks" in words:
    config.objective.update(name="block", block_length=32, weighting="nelbo")
    config.sample.update(order="confidence", num_steps=16)
  else:
    config.objective.weighting = "nelbo"
    config.sample.update(order="random", num_steps=64)
  stage = functools.partial(
    config_lib.stage, unit="paragraphs", length=128, updates=24
  )
  config.stages = (stage(name="convert"),)
  if "blocks" in words:
    grown = (4, 4), (16, 4), (32, 16)  # tokens per block, updates
    config.stages = tuple(
      stage(name=f"blocks of {size}", block_length=size, updates=updates)
      for size, updates in grown
    )
  if "gradual" in words:
    config.stages[0].opening = 0.1
  config.optimizer.update(
    learning_rate=1e-4,
    warmup_steps=2,
    min_lr_ratio=0.0,
    weight_decay=0.0,
    ema_decay=0.0,  # so few updates leave nothing to average
  )
  config.train.log_every = 1
  config.eval.update(rows=8, final_rows=16, masks_per_row=4, batch_size=16)
  config.eval.samples = 0
  config.sample.update(temperature=1.0, temperature_range=None)
  if "full" in words:
    _as_published(config)
  return config_lib.apply_arg(
    config, arg, "shifted", "gradual", "causal", "blocks", "full"
  )


def _as_published(config):
  config.name += "_full"
  config.data.update(corpus="text:corpus/*.jsonl", batch_size=256)
  # Of so much text, a thousandth is enough to measure.
  config.data.update(eval_fraction=0.001, test_fraction=0.001)
  for stage in config.stages:
    stage.update(length=1024, updates=500)
  config.stages[-1].update(updates=None, epochs=10.0)
  config.optimizer.update(accumulation=8, warmup_steps=1000, ema_decay=0.9999)
  config.train.update(log_every=20, checkpoint_every=500)
  config.eval.update(every=1000, rows=512, final_rows=None, masks_per_row=16)
  config.eval.update(batch_size=64, samples=64)
