"""Configuration of evaluation: how often, on how many rows and samples."""

import dataclasses

from mdm_jax.core.fields import COUNT, POSITIVE, SIZE, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """The held-out likelihood bound, and measures of samples."""

  every: int = field(
    500,
    "updates between evaluations during training (0: only at the end)",
    COUNT,
  )
  rows: int = field(
    128, "validation rows per evaluation during training", POSITIVE
  )
  final_rows: int | None = field(
    None, "test rows of the final evaluation (None: all)", POSITIVE
  )
  masks_per_row: int = field(
    16, "mask rates drawn per row, stratified", "[1, 65536]"
  )
  batch_size: int = field(64, "masked rows per denoiser call", SIZE)
  samples: int = field(
    64,
    "texts drawn for text metrics such as repetition and grade (0: none)",
    COUNT,
  )
  judge: str = field(
    "",
    "hf:FOLDER of a causal model that scores samples ('': an n-gram model of"
    " the training text)",
    path=True,
  )
