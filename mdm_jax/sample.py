"""Samples texts from a trained model: free, from a prompt, or into a template.

model = mdm_jax.load("runs/quickstart")
print(model.generate("We the [MASK:3] of", num_samples=2).texts)
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from mdm_jax import config as config_lib
from mdm_jax import tuned_sampling
from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.data import corpora
from mdm_jax.evaluation.pages import picture
from mdm_jax.evaluation.pages import samples as samples_page
from mdm_jax.huggingface import folder as folders
from mdm_jax.imported_model import load_imported
from mdm_jax.objectives.measured import LOSS_BY_MASKED_SHARE, Curve, curve_in
from mdm_jax.sampling import prompts as prompts_lib
from mdm_jax.sampling import template
from mdm_jax.sampling import trace as trace_lib
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import TextSampler, effective
from mdm_jax.sampling.live import LiveView
from mdm_jax.sampling.pieces import Pieces
from mdm_jax.sampling.sampler import Watch
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.samples import Samples
from mdm_jax.scoring import Scorer, Scores
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.tuned_sampling import Which
from mdm_jax.workdir import Workdir


def load(
  workdir: str | Workdir,
  step: int | None = None,
  config: Config | None = None,
  sampling: str = Which.AUTO,
) -> "Model":
  """Loads a trained model from a run's folder, or from hf:FOLDER.

  Args:
    workdir: the run's folder; or hf:FOLDER, where Hugging Face's libraries
      saved a model (docs/huggingface.md).
    step: update of the checkpoint (None: the best checkpoint).
    config: a config with other settings for the same model (None: the run's).
    sampling: without a config, which sampling settings to take: "tuned" for
      those that --mode=tune found, "config" for the run's, "auto" for the
      former if there are any.

  Raises:
    UserError: there is no run, no such checkpoint, or it can't be read.
  """
  if isinstance(workdir, str) and folders.is_named(workdir):
    return Model(load_imported(workdir, config))
  workdir = Workdir(workdir) if isinstance(workdir, str) else workdir
  if config is None:
    config = tuned_sampling.applied(workdir.read_config(), workdir, sampling)
  results = workdir.read("results.json")
  curve = curve_in(results, LOSS_BY_MASKED_SHARE, "validation")
  return Model(load_model(workdir, config, step), curve)


class Model:
  """A trained model that samples and scores texts.

  Attributes:
    config: the run's config; `config.sample` has the default settings.
    tokenizer: text to ids and back.
    method: how the model is sampled, and which settings apply.
    watch: called with (step, token ids [B, L]) during sampling.
  """

  def __init__(self, model: TrainedModel, curve: Curve | None = None):
    """Wraps a trained model.

    Args:
      model: the denoiser, its parameters and its tokenizer.
      curve: its loss by mask rate, which `schedule=optimal` follows.
    """
    self.config, self.tokenizer = model.config, model.tokenizer
    self.watch: Watch | None = None
    self._model, self._mesh = model, model.mesh
    self._curve = curve
    self._pieces = Pieces(self.tokenizer)
    self._samplers: dict[tuple[int, Watch | None], TextSampler] = {}
    self._scorer: Scorer | None = None
    with jax.set_mesh(self._mesh):
      objective = held_out_objective(
        self.config, self.tokenizer.vocab, self._mesh
      )
    self._decoding = objective.decoding()
    self.method = SAMPLERS[self._decoding.order]

  def generate(
    self,
    prompts: str | Sequence[str] = "",
    num_samples: int = 1,
    stream: bool = False,
    **settings: Any,
  ) -> Samples | Iterator[str]:
    """Draws `num_samples` texts for each prompt, prompt by prompt.

    Row b depends only on its prompt, `seed` and b. A new combination of
    settings is compiled at its first use; seed, temperature, min_p and top_p
    may change without compiling.

    Example:
      samples = model.generate(["We the", "[MASK:5] of"], order="random")
      samples.texts  # two strings

    Args:
      prompts: each the beginning of a text, or a template with [MASK],
        [MASK:5] or [MASK:1-8] where tokens are drawn
        (`mdm_jax.sampling.template`); "" for free text.
      num_samples: texts per prompt.
      stream: yield a single text in pieces, once they are final.
      **settings: fields of `SampleConfig` that differ from the run's.

    Returns:
      The texts and how they were drawn: token ids [steps + 1, B, L]; the step,
      probability and entropy in nats of every token [B, L]; the denoiser calls
      of every text [B]. B = len(prompts) x num_samples.

    Raises:
      UserError: a prompt or a setting is invalid.
    """
    found, config = self._candidates(prompts, num_samples, settings)
    if not stream:
      return self._draw_prompted(found, config, num_samples)
    if (count := len(found.counts) * num_samples) > 1:
      raise UserError(f"stream=True yields a single text, not {count}")
    draw = lambda: self._draw_prompted(found, config, watch=self._pieces)
    return self._pieces.of(draw, config, self._decoding)

  def stream(
    self,
    prompts: str | Sequence[str] = "",
    num_samples: int = 1,
    **settings: Any,
  ) -> Iterator[Samples]:
    """Yields what `generate` returns, in parts that need little memory."""
    found, config = self._candidates(prompts, num_samples, settings)
    parts = self._sampler(found.canvas.tokens.shape[1]).prompted(
      self._model.params, found, config, self._curve, num_samples
    )
    # Entered for each part: across a yield, it would be the caller's mesh too.
    while True:
      with jax.set_mesh(self._mesh):
        part = next(parts, None)
      if part is None:
        return
      yield part

  def _candidates(
    self,
    prompts: str | Sequence[str],
    num_samples: int,
    settings: dict[str, Any],
  ) -> tuple[template.Candidates, SampleConfig]:
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts or num_samples < 1:
      raise UserError(
        "nothing to draw: give a prompt and num_samples of at least 1"
      )
    config = self.settings(**settings)
    length = config.length or self.config.stages[-1].length
    self._sampler(length)  # raises where this length can't be sampled
    return template.candidates(prompts, self.tokenizer, length), config

  def fill(
    self,
    tokens: Int[np.ndarray, "B L"],
    free: Bool[np.ndarray, "B L"],
    lengths: Int[np.ndarray, "B"] | None = None,
    **settings: Any,
  ) -> Samples:
    """Draws the free tokens of each row and keeps all others.

    Args:
      tokens: ids; at free positions they are ignored.
      free: which positions to draw, any pattern in each row.
      lengths: tokens of each row before its padding (None: all L).
      **settings: fields of `SampleConfig` that differ from the run's.

    Returns:
      As `generate`.

    Raises:
      UserError: a given token is no text id, or a setting is invalid.
    """
    if not len(tokens):
      raise UserError("nothing to draw: tokens has no rows")
    if lengths is None:
      lengths = np.full(len(tokens), tokens.shape[1])
    inside = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    given = tokens[~free & inside]
    wrong = given[~self.tokenizer.vocab.may_be_text(given)]
    if wrong.size:
      raise UserError(
        f"tokens has id {wrong[0]}, which is not a text token; use ids of the"
        " tokenizer's text tokens"
      )
    canvas = Canvas(tokens.astype(np.int32), free, lengths.astype(np.int32))
    config, sampler = self.settings(**settings), self._sampler(tokens.shape[1])
    with jax.set_mesh(self._mesh):
      return sampler.draw(self._model.params, canvas, config, self._curve)

  def score(
    self,
    texts: str | Sequence[str],
    given: str | Sequence[str] | None = None,
    likelihood: str = "nelbo",
    draws: int = 64,
  ) -> Scores:
    """Returns the likelihood of each text, alone or given others.

    Example:
      scores = model.score([" so.", " law."], given="It is", likelihood="chain")
      scores.nats  # of " so." and of " law.", both after "It is"

    Args:
      texts: one or more texts. Those longer than a row are cut into rows, if
        nothing is given.
      given: a prompt, which the texts continue, or a template with one hole, in
        which they stand; one for all, or one for each. A hole must have as many
        tokens as its text; [MASK:*] always has. None: the whole text is scored,
        with its end.
      likelihood: "nelbo", the bound (exact for an autoregressive model);
        "chain" or "chain:ORDER", exact for a sampler that draws one token per
        step, by default from left to right; or "orders:K", the bound of K
        random orders.
      draws: random mask rates per text of "nelbo", a multiple of 8; the error
        falls with their square root.

    Raises:
      UserError: an argument is invalid, or the texts don't fit in a row.
    """
    if self._scorer is None:
      self._scorer = Scorer(self._model)
    return self._scorer(texts, given, likelihood, draws)

  def _draw_prompted(
    self,
    found: template.Candidates,
    config: SampleConfig,
    repeat: int = 1,
    watch: Watch | None = None,
  ) -> Samples:
    sampler = self._sampler(found.canvas.tokens.shape[1], watch)
    with jax.set_mesh(self._mesh):
      return sampler.draw_prompted(
        self._model.params, found, config, self._curve, repeat
      )

  def settings(self, **settings: Any) -> SampleConfig:
    """Returns the run's settings with some changed, all validated.

    Raises:
      UserError: there is no such setting, or a value is invalid.
    """
    # Through `from_dict`, for the same checks as in a config file.
    raw = config_lib.to_dict(self.config)
    raw["sample"] |= settings
    return config_lib.from_dict(raw).sample

  def most_steps(self, length: int) -> int:
    """Returns the largest number of steps of a text of `length` tokens."""
    return self.method.steps(self.config.sample, length, self._decoding)

  def _sampler(self, length: int, watch: Watch | None = None) -> TextSampler:
    key = length, watch or self.watch
    if key not in self._samplers:
      self._samplers[key] = TextSampler(
        *(self._model.denoiser, self.tokenizer, self._mesh, *key),
        decoding=self._decoding,
        untold=corpora.untold_hole(self.config.data),
      )
    return self._samplers[key]


def sample_workdir(
  config: Config,
  workdir: Workdir,
  prompt: str = "",
  trace: bool = False,
  page: str | None = None,
  keep: bool = True,
  file: str = "",
) -> list[Any]:
  """Draws texts from a run's best checkpoint and prints them.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.
    prompt: the beginning of every text, or a template.
    trace: whether to show the first text while it is drawn, and to store in the
      workdir's folder `samples` how all were drawn.
    page: path of an HTML page to write that shows how all were drawn.
    keep: whether to return the texts; False keeps memory constant for any
      number of them.
    file: path of a file with prompts, instead of `prompt`.

  Returns:
    The texts; with `file`, {"prompt": ..., "texts": [...]} for each prompt.

  Raises:
    UserError: a prompt or a setting is invalid, or a file can't be written.
  """
  # Before the model is loaded: a file with a mistake fails at once.
  given = prompts_lib.read(file) if file else [prompt]
  model = load(workdir, config=config)
  try:
    texts = _draw_all(config, model, workdir, given, trace, page, keep)
  except template.PromptError as error:
    # Only here is it known which file and line the prompt is from.
    if not file:
      raise
    where = f"--prompts={file}, line {error.number}"
    raise UserError(f"{where}: {error.why}") from None
  if not file or not keep:
    return texts
  n = config.sample.num_samples
  return [
    {"prompt": prompt, "texts": texts[i * n : (i + 1) * n]}
    for i, prompt in enumerate(given)
  ]


def _draw_all(
  config: Config,
  model: Model,
  workdir: Workdir,
  prompts: list[str],
  trace: bool,
  page: str | None,
  keep: bool,
) -> list[str]:
  count = config.sample.num_samples
  names = _names(len(prompts), count)
  # A trace or a page needs every step of every text in memory; without them
  # texts are printed as they come.
  if not trace and not page:
    return _print_all(model.stream(prompts, count), names, keep)
  steps = model.most_steps(config.sample_length)
  view = LiveView(model.tokenizer, steps)
  model.watch = view.show if trace else None
  with view if trace else contextlib.nullcontext():
    drawn = model.generate(prompts, count)
  texts = _print_all([drawn], names, keep)
  if distributed.is_first():
    settings = effective(config.sample, model.method.unused)
    html = samples_page.render(drawn, model.tokenizer, settings)
    if trace:
      folder = workdir.path / "samples"
      svg = picture.render(drawn, model.tokenizer)
      pages = {"samples.html": html, "samples.svg": svg}
      trace_lib.save(drawn, model.tokenizer, settings, pages, folder)
    if page:
      _write_page(page, html)
  return texts


def _names(prompts: int, samples: int) -> Iterator[str]:
  for prompt in range(1, prompts + 1):
    of_several = f"prompt {prompt}, " if prompts > 1 else ""
    for sample in range(1, samples + 1):
      yield f"{of_several}sample {sample}"


def _print_all(
  parts: Iterable[Samples], names: Iterator[str], keep: bool
) -> list[str]:
  """Prints texts as they come; returns them if `keep` is set."""
  kept = []
  for part in parts:
    for text, calls in zip(part.texts, part.calls, strict=True):
      console.rule(f"{next(names)}, {calls} denoiser calls")
      console.print(text, soft_wrap=True)
    kept += part.texts if keep else []
  return kept


def _write_page(path: str, page: str) -> None:
  try:
    epath.Path(path).expanduser().write_text(page, encoding="utf-8")
  except OSError as error:
    raise UserError(f"--html={path}: {error.strerror}") from error
