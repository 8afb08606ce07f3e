"""OpenWebText with MDLM's settings: GPT-2's tokenizer, length 1024.

  python -m mdm_jax.main --config=configs/owt.py

It reads three things that are not part of this repository:

  owt/train/*      all documents but the last 100,000, in any format of
                   docs/data.md, such as .jsonl or .parquet
  owt/heldout/*    the last 100,000 documents
  gpt2/merges.txt  GPT-2's merges, also known as vocab.bpe

From one file of lines, `head -n -100000` and `tail -n 100000` make the two
parts. MDLM (Sahoo et al. 2024, arXiv 2406.07524) and those after it call the
last 100,000 documents the validation set and report on them. Here they are the
test text, which selects nothing; a thousandth of the other documents selects
the checkpoint.

Model and training are MDLM's: 12 layers x 768, 512 rows of 1024 tokens, a
million updates, AdamW at 3e-4, constant after 2500 updates of warm-up. That is
524 billion tokens, for which BD3-LM's authors report a perplexity of at most
22.98; MDLM's own paper has 23.21, for 262 billion. Rows differ from theirs,
which cut the joined text every 1022 tokens: here a row begins with a sentence.
The text is larger than memory, so prepare it first:

  python -m mdm_jax.main --mode=prepare --config=configs/owt.py --workers=16
    --config.data.prepared=FOLDER

The text was not at hand: at full size this config was only lowered, and scaled
down it was run for two updates on text of the same form. It was never trained.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to a CPU and about a minute."""
  config = config_lib.default_config()
  config.name = "owt"
  config.data.update(
    corpus="text:owt/train/*",
    test_corpus="text:owt/heldout/*",
    batch_size=512,
    eval_fraction=0.001,
  )
  config.tokenizer.update(kind="gpt2", path="gpt2/merges.txt")
  config.model.update(
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    dropout=0.1,
    qk_norm=False,
    tie_embeddings=False,
  )
  config.objective.weighting = "nelbo"
  config.noise.schedule = "linear"  # MDLM calls it log-linear
  config.stages = (
    config_lib.stage(
      name="train",
      unit="paragraphs",
      length=1024,
      updates=1_000_000,
      mask_rate=None,  # by the noise schedule
    ),
  )
  config.optimizer.update(
    learning_rate=3e-4,
    warmup_steps=2500,
    min_lr_ratio=1.0,  # constant after the warm-up
    weight_decay=0.0,
    clip_norm=1.0,
    b2=0.999,
    ema_decay=0.9999,
  )
  config.train.update(log_every=100, checkpoint_every=5_000)
  config.eval.update(every=10_000, rows=512, final_rows=None)
  config.sample.update(
    num_steps=1024,
    order="random",
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    top_p=None,
  )
  return config_lib.apply_arg(config, arg)
