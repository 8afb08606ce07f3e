"""Fine-tunes a causal model with LoRA on prompts and answers, on two cores.

  python -m mdm_jax.main --config=configs/lora.py
    --config.init_from=hf:FOLDER --config.data.corpus=chat:FILE.jsonl

FOLDER is a causal model of Hugging Face, or a .gguf file. Its weights stay as
they are; the checkpoints have only what is added to them. docs/finetuning.md
has the format of the prompts and answers, and what this one learned.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to seconds."""
  config = config_lib.default_config()
  config.name = "lora"
  config.init_from = "hf:models/SmolLM2-135M-Instruct"
  config.data.update(corpus="chat:exchanges.jsonl", batch_size=4)
  config.model.lora.update(rank=8, alpha=16.0)
  config.objective.name = "autoregressive"
  config.stages = (
    config_lib.stage(
      name="answers", unit="conversations", length=128, updates=40
    ),
  )
  config.optimizer.update(
    learning_rate=1e-3,
    warmup_steps=4,
    min_lr_ratio=0.0,
    weight_decay=0.0,
    ema_decay=0.0,  # so few updates leave nothing to average
  )
  config.train.update(log_every=1, checkpoint_every=10)
  config.eval.update(every=0, final_rows=16, batch_size=4, samples=8)
  config.sample.update(temperature=1.0, temperature_range=None)
  config.sample.update(top_k=1, top_p=None)
  return config_lib.apply_arg(config, arg)
