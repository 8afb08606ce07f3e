"""The training loop: from a config and a workdir to a measured model.

  prepare data -> lay out the stages -> restore or initialise
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
from mdm_jax.core import rng
from mdm_jax.core.config import Config
from mdm_jax.core.errors import Stopped
from mdm_jax.core.metrics import Writers
from mdm_jax.core.progress import ProgressLine, console, duration
from mdm_jax.core.sharding import check_divides, check_model, make_mesh
from mdm_jax.core.signals import StopRequest
from mdm_jax.core.workdir import Workdir
from mdm_jax.data import batches
from mdm_jax.data.batches import Batch
from mdm_jax.data.prepared import PreparedData, prepare
from mdm_jax.training.checkpoint import Checkpoints
from mdm_jax.training.curriculum import Curriculum, StagePlan, make_curriculum
from mdm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mdm_jax.training.state import TrainState, abstract_state, init_state
from mdm_jax.training.step import make_train_step


def train_and_evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
  """Trains all stages, or what is left of them, and returns the results.

  Raises:
    UserError: the config, the data or the workdir can't be used.
    Stopped: a signal came; the same command resumes.
  """
  workdir.create()
  data = prepare(config)
  mesh = make_mesh(config.mesh)
  check_divides("data.batch_size", config.data.batch_size, mesh)
  check_divides("eval.batch_size", config.eval.batch_size, mesh)
  check_model(config.model, mesh)
  workdir.check_tokenizer(data.tokenizer.sha256)
  with (
    jax.set_mesh(mesh),
    Checkpoints(workdir.path, config.train.keep_latest) as checkpoints,
  ):
    run = _Run(config, workdir, data, mesh, checkpoints)
    if (checkpoints.latest() or 0) >= run.curriculum.updates:
      console.print(f"{workdir.path} is finished: nothing to train")
      results = workdir.read_results()
      if results is not None:
        return results
    else:
      plan_lib.show(config, data, run.curriculum, run.denoiser, mesh)
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


class _Run:
  """One attempt at a run: what it is made of, and the loop."""

  def __init__(
    self,
    config: Config,
    workdir: Workdir,
    data: PreparedData,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
  ):
    self.config, self.workdir, self.data = config, workdir, data
    self.mesh, self.checkpoints = mesh, checkpoints
    self.measures = evaluate_lib.Measures(config, data, mesh)
    self.denoiser = self.measures.denoiser
    self.curriculum = make_curriculum(config, [len(r) for r in data.stages])
    self.schedule = learning_rate_schedule(config.optimizer, self.curriculum)
    self.optimizer = make_optimizer(config.optimizer, self.schedule)
    self.clock = _Clock()

  def train(self) -> None:
    """Runs every update that is left."""
    state = self._restore_or_init()
    # Only now, so that a config that can't resume the run leaves it as it is.
    self.workdir.write_config(self.config, self.data.tokenizer.sha256)
    self.data.tokenizer.save(self.workdir.path)
    with (
      Writers(self.workdir.path, after=int(state.step)) as writers,
      ProgressLine(self.curriculum.updates) as line,
      StopRequest() as stop,
    ):
      if int(state.step) == 0:
        texts = {"config": _as_text(self.config)}
        writers.write_texts(0, texts)
      self._loop(state, _Log(self, writers, line), stop)

  def finish(self) -> dict[str, Any]:
    """Measures the best checkpoint and writes the results."""
    return evaluate_lib.evaluate_checkpoint(
      self.workdir, self.measures, self.checkpoints
    )

  def _restore_or_init(self) -> TrainState:
    latest = self.checkpoints.latest()
    if latest is None:
      key = rng.stream(self.config.seed, "init")
      return init_state(self.denoiser, self.optimizer, key)
    saved = self.checkpoints.metrics(latest)
    self.clock.tokens = saved["tokens_seen"]
    self.clock.seconds_before = saved["wall_seconds"]
    console.print(f"resuming {self.workdir.path} at update {latest}")
    like = abstract_state(self.denoiser, self.optimizer)
    return self.checkpoints.restore(latest, like)

  def _loop(self, state: TrainState, log: "_Log", stop: StopRequest) -> None:
    stage = step_fn = None
    for update in range(int(state.step), self.curriculum.updates):
      if self.curriculum.stage_at(update) is not stage:
        stage = self.curriculum.stage_at(update)
        step_fn = self._make_step(stage)
        log.start_stage(stage)
      state, metrics = step_fn(state, self._batch(stage, update))
      log.add(update + 1, metrics)
      self._after_update(update + 1, state, log, stop)

  def _make_step(self, stage: StagePlan):
    return make_train_step(
      self.config,
      stage,
      self.denoiser,
      self.optimizer,
      self.schedule,
      self.data.tokenizer.vocab.mask,
    )

  def _batch(self, stage: StagePlan, update: int) -> Batch:
    numbers = batches.row_numbers(
      stage.rows,
      batches.stage_seed(self.config.seed, stage.index),
      update - stage.start,
      self.config.rows_per_update,
    )
    rows = self.data.stages[stage.index]
    return batches.make_batch(
      rows, numbers, self.config.optimizer.accumulation, self.mesh
    )

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

  def __init__(self, run: _Run, writers: Writers, line: ProgressLine):
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
    texts = {f"samples/{i}": text for i, text in enumerate(samples)}
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
