"""The training loop: from a config and a workdir to a measured model.

  prepare data -> tell the plan -> restore or initialise
  -> update, log, evaluate, save -> final evaluation and samples

The state saved under update k is the state after k updates; batch, masks and
learning rate of the next one follow from k alone, so a resumed run continues
exactly where it was. Keep the order inside the loop: dispatch an update, and
only then read the numbers of the one before, so the device never waits.
"""

import dataclasses
import time
from typing import Any

import jax
from absl import logging

from mdm_jax import evaluate as evaluate_lib
from mdm_jax import plan as plan_lib
from mdm_jax import preview
from mdm_jax.core.config import Config
from mdm_jax.core.errors import Stopped
from mdm_jax.core.metrics import Writers
from mdm_jax.core.progress import ProgressLine, console, duration
from mdm_jax.core.sharding import training_mesh
from mdm_jax.core.signals import StopRequest
from mdm_jax.core.workdir import Workdir
from mdm_jax.data.prepared import prepare
from mdm_jax.training.checkpoint import Checkpoints
from mdm_jax.training.curriculum import Curriculum, StagePlan
from mdm_jax.training.state import TrainState
from mdm_jax.training.trainer import Trainer


def train_and_evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Trains all stages, or what is left of them, and returns the results.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    Stopped: a signal came; the same command resumes.
  """
  workdir.create()
  data = prepare(config, workdir.path)
  mesh = training_mesh(config)
  workdir.check_tokenizer(data.tokenizer.sha256)
  with (
    jax.set_mesh(mesh),
    Checkpoints(workdir.path, config.train.keep_latest) as checkpoints,
  ):
    run = Run(Trainer(config, data, mesh), workdir, checkpoints)
    if (checkpoints.latest() or 0) >= run.curriculum.updates:
      console.print(f"{workdir.path} is finished: nothing to train")
      results = workdir.read_results()
      if results is not None:
        return results
    else:
      run.train()
    return run.finish()


@dataclasses.dataclass
class _Clock:
  """Tokens and time of the run, over all its attempts."""

  tokens: float = 0.0
  seconds_before: float = 0.0
  started: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def seconds(self) -> float:
    return self.seconds_before + time.monotonic() - self.started


class Run:
  """One attempt at a run: what it is made of, and the loop."""

  def __init__(
    self, trainer: Trainer, workdir: Workdir, checkpoints: Checkpoints
  ):
    self.trainer, self.workdir = trainer, workdir
    self.checkpoints = checkpoints
    self.config, self.data = trainer.config, trainer.data
    self.curriculum = trainer.curriculum
    self.measures = evaluate_lib.Measures(
      self.config, self.data, trainer.denoiser, trainer.mesh
    )
    self.clock = _Clock()

  def train(self) -> None:
    """Tells the plan, then runs every update that is left."""
    # First what is only looked at: a config that can't resume the run must
    # leave it as it is, and the calibration's state must be gone before ours.
    done = self.checkpoints.latest() or 0
    if done:
      self.checkpoints.check(done, self.trainer.abstract())
    preview.show(self.config, self.data)
    plan_lib.show(plan_lib.make_plan(self.trainer, done))
    state = self._restore_or_init()
    self.workdir.write_config(self.config, self.data.tokenizer.sha256)
    self.workdir.write_data(self.data.manifest)
    self.data.tokenizer.save(self.workdir.path)
    with (
      Writers(self.workdir.path, after=done) as writers,
      ProgressLine(self.curriculum.updates) as line,
      StopRequest() as stop,
    ):
      if done == 0:
        writers.write_texts(0, {"config": _as_text(self.config)})
        texts = preview.describe(self.config, self.data)
        writers.write_texts(0, {f"data/{k}": v for k, v in texts.items()})
      self.advance(state, self.curriculum.updates, writers, line, stop)

  def advance(
    self,
    state: TrainState,
    until: int,
    writers: Writers,
    line: ProgressLine,
    stop: StopRequest,
  ) -> TrainState:
    """Does what is left of the first `until` updates; returns the state then.

    Logs, evaluates and saves on the way. The state it is given is consumed.

    Raises:
      Stopped: a signal came, and all that was done is saved.
    """
    log, stage = _Log(self, writers, line), None
    for update in range(int(state.step), until):
      if self.curriculum.stage_at(update) is not stage:
        stage = self.curriculum.stage_at(update)
        log.start_stage(stage)
      state, metrics = self.trainer.update(state, update)
      log.add(update + 1, metrics)
      self._after_update(update + 1, state, log, stop)
    log.flush()
    return state

  def finish(self) -> dict[str, Any]:
    """Measures the best checkpoint and writes the results."""
    return evaluate_lib.evaluate_checkpoint(
      self.workdir, self.measures, self.checkpoints
    )

  def _restore_or_init(self) -> TrainState:
    latest = self.checkpoints.latest()
    if latest is None:
      return self._start()
    saved = self.checkpoints.metrics(latest)
    self.clock = _Clock(saved["tokens_seen"], saved["wall_seconds"])
    console.print(f"resuming {self.workdir.path} at update {latest}")
    return self.checkpoints.restore(latest, self.trainer.abstract())

  def _start(self) -> TrainState:
    self.clock = _Clock()
    source = self.config.init_from
    if not source:
      return self.trainer.init()
    with Checkpoints(source) as finished:
      step, params = finished.restore_best_params(self.trainer.denoiser)
    console.print(f"starting from the parameters of {source}, update {step}")
    return self.trainer.init_from(params)

  def _after_update(
    self, done: int, state: TrainState, log: "_Log", stop: StopRequest
  ) -> None:
    """Evaluates and saves where that is due, and stops where it was asked."""
    last = done == self.curriculum.updates
    bound = {}
    every = self.config.eval.every
    if last or (every and done % every == 0):
      bound = log.evaluate(done, state)
    if bound or done % self.config.train.checkpoint_every == 0 or stop.name:
      log.flush()
      self.checkpoints.save(state, bound | log.progress())
    if stop.name and not last:
      self.checkpoints.close()
      raise Stopped(
        f"{stop.name}: saved update {done} of {self.curriculum.updates}; the"
        " same command resumes"
      )


class _Log:
  """Numbers of the updates, on their way to the screen and the files."""

  def __init__(self, run: Run, writers: Writers, line: ProgressLine):
    self._run, self._writers, self._line = run, writers, line
    self._window: list[dict[str, float]] = []
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._stage: StagePlan | None = None
    self._since = time.monotonic()

  def start_stage(self, stage: StagePlan) -> None:
    """Names the stage in what follows."""
    self.flush()
    self._stage = stage
    self._window, self._since = [], time.monotonic()

  def add(self, update: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the numbers of an update just dispatched; reads those before."""
    self.flush()
    self._pending = update, metrics

  def flush(self) -> None:
    """Reads the numbers that are still on the device."""
    if self._pending is None:
      return
    update, metrics = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    self._run.clock.tokens += values["tokens"]
    if values["skipped"]:
      logging.warning("update %d: not finite, not applied", update)
    self._window.append(values)
    if update % self._run.config.train.log_every == 0:
      self._write_window(update)

  def progress(self) -> dict[str, float]:
    """What a checkpoint has to remember beside the state."""
    clock = self._run.clock
    return {"tokens_seen": clock.tokens, "wall_seconds": clock.seconds}

  def evaluate(self, done: int, state: TrainState) -> dict[str, float]:
    """Measures the averaged parameters on a few held-out rows."""
    self.flush()
    began = time.monotonic()
    measures = self._run.measures
    rows = self._run.config.eval.rows
    measured = measures.likelihood(state.ema_params, rows)
    scalars = {f"eval/{name}": value for name, value in measured.items()}
    self._writers.write_scalars(done, scalars)
    samples = measures.sample(state.ema_params)
    texts = {f"samples/{i}": text for i, text in enumerate(samples.texts)}
    self._writers.write_texts(done, texts)
    bound, stderr = measured["nelbo_per_token"], measured["nelbo_stderr"]
    self._line.say(
      f"update {done}: held-out NELBO {bound:.4f} ± {stderr:.4f} nats/token,"
      f" {measured['bits_per_byte']:.3f} bits/byte"
      f" ({duration(self._run.clock.seconds)})"
    )
    self._since += time.monotonic() - began  # not the training's time
    return {"nelbo_per_token": bound}

  def _write_window(self, update: int) -> None:
    """Writes means since the last time, and moves the progress line."""
    seconds = max(time.monotonic() - self._since, 1e-9)
    count = len(self._window)
    means = {
      name: sum(values[name] for values in self._window) / count
      for name in self._window[0]
    }
    speed = means.pop("tokens") * count / seconds
    scalars = {f"train/{name}": value for name, value in means.items()}
    scalars |= {
      "train/tokens_per_second": speed,
      "train/tokens_seen": self._run.clock.tokens,
      "train/stage": self._stage.index + 1,
      "train/update_seconds": seconds / count,
    }
    self._writers.write_scalars(update, scalars)
    left = _seconds_left(
      self._run.curriculum, self._stage, update, seconds / count
    )
    self._line.update(
      self._stage.config.name, update, means["loss"], speed, *left
    )
    self._window, self._since = [], time.monotonic()


def _seconds_left(
  curriculum: Curriculum, now: StagePlan, update: int, seconds: float
) -> tuple[float, float]:
  """Time left for the stage and the run, a row's cost being its length."""
  stage = (now.end - update) * seconds
  later = sum(
    s.updates * seconds * s.config.length / now.config.length
    for s in curriculum.stages[now.index + 1 :]
  )
  return stage, stage + later


def _as_text(config: Config) -> str:
  return "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(config).items())
