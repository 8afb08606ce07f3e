"""Flags, and which program they ask for; no logic.

  python -m mdm_jax.main --config=configs/quickstart.py
  python -m mdm_jax.main --mode=eval --workdir=runs/quickstart
  python -m mdm_jax.main --mode=sample --workdir=runs/quickstart --prompt="We"

Any field of the config can be set: --config.data.batch_size=4. Without
--config, the config saved in the workdir is used.
"""

import json
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax.core import config as config_lib
from mdm_jax.core.config import Config
from mdm_jax.core.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER, UserError
from mdm_jax.core.workdir import Workdir

_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "eval", "sample"], "What to do."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder (default: runs/<config name>)."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text a sample begins with.")
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", None, "Texts to draw (default: sample.num_samples)."
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print the results as JSON on the last line."
)


def main(_: list[str]) -> int:
  """Runs the program the flags ask for; returns the exit code."""
  try:
    results = _run(*_config_and_workdir())
  except UserError as error:
    return _fail(str(error))
  if _JSON.value:
    print(json.dumps(results))
  return EXIT_OK


def _run(config: Config, workdir: Workdir):
  _configure_jax()
  # Imported here, so that --help and a wrong flag answer at once.
  from mdm_jax import evaluate, sample, train

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
  if _NUM_SAMPLES.value is not None:
    raw = config_lib.to_dict(config)
    raw["sample"]["num_samples"] = _NUM_SAMPLES.value
    config = config_lib.from_dict(raw)
  match _MODE.value:
    case "train":
      try:
        return train.train_and_evaluate(config, workdir)
      except train.Stopped as stopped:
        print(stopped)
        sys.exit(EXIT_STOPPED)
    case "eval":
      return evaluate.evaluate_workdir(config, workdir)
    case "sample":
      return sample.sample_workdir(config, workdir, _PROMPT.value)


def _configure_jax() -> None:
  """Keeps compiled programs for the next start."""
  import jax

  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update(
      "jax_compilation_cache_dir", os.path.join(cache, "mdm_jax", "xla")
    )


def _config_and_workdir() -> tuple[Config, Workdir]:
  value = flags.FLAGS["config"].value
  if value is None:
    raise UserError(
      "give --config=FILE, for example --config=configs/quickstart.py, or"
      " --workdir=FOLDER of a run"
    )
  config = config_lib.from_config_dict(value)
  path = _WORKDIR.value or os.path.join("runs", config.name)
  return config, Workdir(path)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses all flags; a mistake is one line on stderr and exit code 2."""
  try:
    flags.FLAGS(argv, known_only=True)  # --workdir decides how config is read
    _define_config(argv)
    flags.FLAGS.unparse_flags()
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}")
    return rest
  except UserError as error:
    sys.exit(_fail(str(error)))
  except FileNotFoundError as error:
    sys.exit(_fail(f"config file not found: {error.filename or error}"))
  except (flags.Error, AttributeError, KeyError, IndexError, ValueError) as e:
    sys.exit(_fail(_first_line(e)))


def _define_config(argv: list[str]) -> None:
  """--config reads a file, or else overrides what the workdir has saved."""
  given = any(a.lstrip("-").split("=")[0] == "config" for a in argv[1:])
  if given or _WORKDIR.value is None:
    config_flags.DEFINE_config_file(
      "config", help_string="Config file, as FILE or FILE:ARGUMENT."
    )
    return
  saved = config_lib.from_dict(Workdir(_WORKDIR.value).read_config_dict())
  config_flags.DEFINE_config_dict("config", config_lib.to_config_dict(saved))


def _first_line(error: Exception) -> str:
  text = " ".join(str(a) for a in error.args) or repr(error)
  return " ".join(text.replace("\\n", " ").split())


def _fail(message: str) -> int:
  print(f"error: {message}", file=sys.stderr)
  return EXIT_USER


def run() -> None:
  """The program's entry."""
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
