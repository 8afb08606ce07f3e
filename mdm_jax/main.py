"""The command-line program: trains, evaluates, samples and plans runs.

  python -m mdm_jax.main --config=configs/quickstart.py
  python -m mdm_jax.main --mode=eval --workdir=runs/quickstart
  python -m mdm_jax.main --mode=sample --workdir=runs/quickstart --prompt="We"
  python -m mdm_jax.main --mode=sample --workdir=runs/quickstart --interactive
  python -m mdm_jax.main --mode=sample --workdir=runs/quickstart --prompts=FILE

--mode=data and --mode=plan show what a run would do; prepare writes the rows of
a corpus too large for memory; train, the default, trains and evaluates; eval,
sample, tune (finds sampling settings), frontier (a temperature sweep), compare
(sampling settings, one change at a time), infill (holes in test text), report
(an HTML page) and export (a folder for other libraries) use what was trained.
Every field of the config is a flag: --config.data.batch_size=4. Without
--config, the config saved in the workdir is used. Exit codes:
docs/reliability.md.
"""

import os
import sys
import threading
import traceback
from typing import Any

from absl import flags

from mdm_jax import command_line
from mdm_jax.config import Config
from mdm_jax.core import log_lines, strict_json
from mdm_jax.core.errors import Exit, Failure, Stopped, UserError
from mdm_jax.core.progress import console
from mdm_jax.workdir import Workdir

flags.adopt_module_key_flags(command_line)
_LAST_SECONDS = 20.0  # for the interpreter to exit by itself

_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  [
    *("data", "plan", "prepare", "train"),
    *("eval", "sample", "tune", "frontier", "compare", "infill"),
    *("report", "export"),
  ],
  "The program to run.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder (default: runs/<config name>)."
)
_PROMPT = flags.DEFINE_string(
  "prompt",
  "",
  "Text that samples begin with; [MASK], [MASK:5] or [MASK:1-8] in it is"
  " filled.",
)
_PROMPTS = flags.DEFINE_string(
  "prompts", "", "File with one prompt per line, or .jsonl, or - for stdin."
)
_TRACE = flags.DEFINE_bool(
  "trace",
  False,
  "Show a sample while it is drawn, and store every sampling step.",
)
_HTML = flags.DEFINE_string(
  "html", None, "Write an HTML page that shows every sampling step."
)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive",
  False,
  "Read prompts from the terminal, and draw a sample for each.",
)
_LIKELIHOOD = flags.DEFINE_string(
  "likelihood",
  "nelbo",
  "What --mode=eval measures: nelbo, with all else; or only, by the chain rule,"
  " chain (left to right), chain:ORDER or orders:K (a bound of K orders).",
)
_SAMPLING = flags.DEFINE_enum(
  "sampling",
  "auto",
  ["auto", "config", "tuned"],
  "Settings of --mode=sample, compare and infill: the run's own, those that"
  " --mode=tune found, or (auto) the latter if there are any.",
)
_WAYS = flags.DEFINE_string(
  "ways", "", "Compare only settings whose name contains this."
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", None, "Samples per prompt (default: sample.num_samples)."
)
_WORKERS = flags.DEFINE_integer(
  "workers", None, "Processes of --mode=prepare (default: one per core).", 1
)
_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "Plan for a mesh of FSDPxTENSOR devices that you don't have, e.g. 64x4.",
)
_DEVICE = flags.DEFINE_string(
  "device", None, "Their kind, e.g. v5e; a run that does not fit is refused."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, in a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes (default: detected by JAX)."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Index of this process, from 0."
)
_JOIN_SECONDS = flags.DEFINE_integer(
  "join_seconds", 300, "Seconds to wait for all processes at the start.", 1
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds",
  100,
  "Seconds of silence after which a process counts as lost.",
  1,
)
_OUT = flags.DEFINE_string("out", None, "The folder that --mode=export makes.")
_FORMAT = flags.DEFINE_string(
  "format",
  "transformers",
  "What --mode=export writes: transformers, llada (its names), gguf (for"
  " llama.cpp), or peft (LoRA's additions alone).",
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print the results as JSON on the last line."
)


def main(_: list[str]) -> int:
  """Runs the program that the flags ask for; returns the exit code."""
  code = _main()
  _end_soon(code)
  return code


def _main() -> int:
  try:
    config = command_line.read_config(_NUM_SAMPLES.value)
    path = _WORKDIR.value or os.path.join("runs", config.name)
    results = _run(config, Workdir(path))
  except Stopped as stopped:
    console.print(stopped, soft_wrap=True)
    return Exit.STOPPED
  except Failure as error:
    return command_line.fail(error)
  # In modes without a handler of their own: they have nothing to save.
  except KeyboardInterrupt:
    print("interrupted: the same command resumes from what was saved")
    return Exit.STOPPED
  except Exception as error:
    return _fail_unforeseen(error)
  if _JSON.value and not console.quiet:
    print(strict_json.dumps(results))
  return Exit.DONE


def _fail_unforeseen(error: Exception) -> int:
  """Reports lack of memory in one line, other errors with a traceback."""
  from mdm_jax.core import memory  # late, so that wrong flags fail at once

  no_memory = memory.as_user_error(error)
  if no_memory:
    return command_line.fail(no_memory)
  traceback.print_exception(error)
  return Exit.BUG


def _end_soon(code: int) -> None:
  """Ends a process that a leftover thread would keep alive."""
  sys.stdout.flush()
  if "jax" not in sys.modules:  # the flags were wrong; nothing has started
    return
  from mdm_jax.core import distributed

  if distributed.count() > 1:
    # A normal exit waits for the other processes; after a failure they may be
    # waiting for this one in a collective, so it leaves at once.
    if code not in (Exit.DONE, Exit.STOPPED):
      distributed.leave(code)
    return
  # After a failed save, a thread of Orbax's waits for a signal that never
  # comes, and the interpreter waits for the thread.
  timer = threading.Timer(_LAST_SECONDS, os._exit, (code,))
  # The timer itself must not delay a normal exit.
  timer.daemon = True
  timer.start()


def _run(config: Config, workdir: Workdir) -> Any:
  from mdm_jax.core import compilation_cache, determinism

  # Before JAX starts a backend: only then does XLA read its flags.
  determinism.ask_for(config.train.deterministic == "true")
  compilation_cache.turn_on()
  _join()
  # Imported late, so that --help and wrong flags are answered at once.
  from mdm_jax import (
    evaluate,
    export,
    export_adapter,
    fit,
    interactive,
    likelihood,
    plan,
    prepare,
    preview,
    report,
    sample,
    training_loop,
    tuned_sampling,
  )
  from mdm_jax.studies import compare, frontier, infilled, tune

  if _MODE.value in ("sample", "compare", "infill", "export"):
    config = tuned_sampling.applied(config, workdir, _SAMPLING.value)

  match _MODE.value:
    case "data":
      return preview.show_data(config)
    case "plan" if _MESH.value:
      return fit.plan_mesh(config, _MESH.value, _DEVICE.value)
    case "plan":
      return plan.plan_run(config)
    case "prepare":
      return prepare.prepare_rows(config, workdir.path, _WORKERS.value)
    case "train":  # handles signals itself, to save before it stops
      return training_loop.train_and_evaluate(config, workdir)
    case "eval" if _LIKELIHOOD.value != "nelbo":
      return likelihood.measure_workdir(config, workdir, _LIKELIHOOD.value)
    case "eval":
      return evaluate.evaluate_workdir(config, workdir)
    case "sample" if len(_prompt_flags()) > 1:
      raise UserError(f"give only one of {', '.join(_prompt_flags())}")
    case "sample" if _INTERACTIVE.value:
      return interactive.converse(config, workdir)
    case "sample":
      return sample.sample_workdir(
        *(config, workdir, _PROMPT.value, _TRACE.value, _HTML.value),
        keep=_JSON.value,
        file=_PROMPTS.value,
      )
    case "tune":
      return tune.tune_workdir(config, workdir)
    case "frontier":
      return frontier.frontier_workdir(config, workdir)
    case "compare":
      return compare.compare_workdir(config, workdir, _WAYS.value)
    case "infill":
      return infilled.infill_workdir(config, workdir)
    case "report":
      return report.report_workdir(config, workdir)
    case "export":
      if _FORMAT.value == "peft":
        return export_adapter.export_workdir(config, workdir, _OUT.value)
      return export.export_workdir(config, workdir, _OUT.value, _FORMAT.value)


def _prompt_flags() -> list[str]:
  """Returns the given flags that are sources of prompts."""
  ways = {
    "--prompt": _PROMPT.value,
    "--prompts": _PROMPTS.value,
    "--interactive": _INTERACTIVE.value,
  }
  return [name for name, value in ways.items() if value]


def _join() -> None:
  """Joins the other processes, if there are any; only process 0 prints."""
  from mdm_jax.core import distributed

  distributed.initialize(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    _JOIN_SECONDS.value,
    _HEARTBEAT_SECONDS.value,
  )
  console.quiet = not distributed.is_first()


if __name__ == "__main__":
  log_lines.run(main, flags_parser=command_line.parse)
