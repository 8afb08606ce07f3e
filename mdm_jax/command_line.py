"""Parses flags into a `Config`; a mistake is one line and exit code 2."""

import dataclasses
import glob
import io
import itertools
import os
import re
import sys
import traceback
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core import coercion, modules
from mdm_jax.core.errors import Exit, Failure, UserError, nearest
from mdm_jax.core.progress import console
from mdm_jax.huggingface import folder as folders
from mdm_jax.model.config import ModelConfig
from mdm_jax.workdir import Workdir

flags.DEFINE_list(
  "modules",
  [],
  "Python modules to import first, which register your own components.",
)
# Modules that config files import and that have moved, old name to new, so that
# an import error can name the new one.
_MOVED = {"mdm_jax.core.config": "mdm_jax.config"}
# --config.objective=NAME is shorthand for --config.objective.name=NAME.
_OBJECTIVE = re.compile(r"^(--?config\.objective)(?==|$)")


def read_config(num_samples: int | None = None) -> Config:
  """Returns the validated config that the parsed flags describe.

  Args:
    num_samples: overrides `sample.num_samples` if given.

  Raises:
    UserError: no config was given, or it is invalid.
  """
  value = flags.FLAGS["config"].value
  if value is None:
    raise UserError(
      "give --config=FILE, for example --config=configs/quickstart.py, or"
      " --workdir=FOLDER of a run"
    )
  if num_samples is not None:
    value.sample.num_samples = num_samples
  named = dict.fromkeys([*value.modules, *flags.FLAGS.modules])
  # Loading runs their code, which is safe here: the user's config file or flags
  # name them. A saved config's modules are imported already; if not,
  # `config.from_dict` has refused it.
  modules.load(named)
  value.modules = tuple(named)
  config = config_lib.from_config_dict(value)
  # A program that only prepares rows has no --workdir.
  workdir = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
  workdir = workdir or os.path.join("runs", config.name)
  return with_imported_sizes(config, Workdir(workdir))


def with_imported_sizes(config: Config, workdir: Workdir) -> Config:
  """Returns a config with the sizes of the model in `init_from`, if imported.

  Prints which of the config's sizes it replaces.
  """
  source = config.init_from
  if not folders.is_named(source):
    return config
  from mdm_jax import imported_model  # late: it loads JAX

  saved = workdir.read("config.json") and workdir.read_config()
  if saved and saved.init_from == source:
    # A run keeps its sizes: the folder may have been deleted since its start.
    model = imported_model.with_sizes(config.model, saved.model)
  else:
    model = imported_model.with_sizes(
      config.model, imported_model.model_of(source)
    )
  given, plain = config.model, ModelConfig()
  replaced = [
    f"{f.name}={value}"
    for f in dataclasses.fields(ModelConfig)
    if (value := getattr(given, f.name))
    not in (getattr(plain, f.name), getattr(model, f.name))
  ]
  if replaced:
    console.print(
      f"{source} has its own sizes: not used {', '.join(replaced)}",
      soft_wrap=True,
      markup=False,
    )
  return dataclasses.replace(config, model=model)


def fail(message: Any) -> int:
  """Prints a failure as one line on stderr; returns its exit code."""
  print(f"error: {message}", file=sys.stderr)
  return message.code if isinstance(message, Failure) else Exit.USER


def parse(argv: list[str]) -> list[str]:
  """Parses all flags; on a mistake, exits with one line and exit code 2."""
  take_any_text()
  # The shell leaves the ~ in --config=~/FILE as it is.
  home = lambda path: os.path.expanduser(path[0])
  argv = [re.sub(r"(?<=-config=)~.*", home, a) for a in argv]
  argv = [_OBJECTIVE.sub(r"\1.name", given) for given in argv]
  path = _config_path(argv)
  try:
    # Two passes: --workdir and --modules decide which --config flags exist.
    flags.FLAGS(argv, known_only=True)
    modules.load(flags.FLAGS.modules)  # they may add fields
    # Before the config flags exist: this check suggests the nearest field.
    _check_overrides(argv)
    _define_config(path, argv)
    flags.FLAGS.unparse_flags()
    return _parse_all(argv)
  except Failure as error:
    sys.exit(fail(error))
  except Exception as error:  # whatever a config file's own code raises
    sys.exit(fail(_describe(error, path)))


def parse_plain(argv: list[str]) -> list[str]:
  """Parses flags of a program that passes --config on without reading it."""
  take_any_text()
  try:
    return _parse_all(argv)
  except (UserError, flags.Error) as error:
    sys.exit(fail(_one_line(error)))


def _parse_all(argv: list[str]) -> list[str]:
  rest = flags.FLAGS(argv)
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}")
  return rest


def take_any_text() -> None:
  """Lets stdin and stdout take any text, whatever the locale.

  A sampled text may hold any character, but a pipe on Windows or an old locale
  can encode only a few: stdout shows ? for the others. Input that is not UTF-8
  is read as surrogates and checked where it is used, so that one bad line does
  not end an interactive session.
  """
  for stream, errors in (
    (sys.stdout, "replace"),
    (sys.stderr, "backslashreplace"),
    (sys.stdin, "surrogateescape"),
  ):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=errors)


def _config_path(argv: list[str]) -> str | None:
  """Returns the file that --config names, without its :ARGUMENT, if any."""
  # By hand: the --config flag is defined later, for this file.
  for given, following in itertools.pairwise([*argv[1:], ""]):
    name, equals, value = given.lstrip("-").partition("=")
    if given.startswith("-") and name == "config":
      return (value if equals else following).partition(":")[0]
  return None


def _check_overrides(argv: list[str]) -> None:
  for given in argv[1:]:
    # --noconfig.FIELD sets a bool to False.
    field = re.match(r"--?(?:no)?config\.([^=]+)", given)
    if field:
      coercion.check_field(field[1], config_lib.form())


def _define_config(path: str | None, argv: list[str]) -> None:
  """Defines --config, from its file or else from the workdir's saved config.

  Args:
    path: the config file, if one is given.
    argv: arguments, which decide the --config.FIELD flags that there are.
  """
  # absl's own parsers refuse None, which many fields allow.
  for kind, parser in (
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (tuple, tuple_parser.TupleParser()),
  ):
    config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
  if path is None and flags.FLAGS.workdir is not None:
    saved = Workdir(flags.FLAGS.workdir).read_config()
    config_flags.DEFINE_config_dict(
      "config", config_lib.to_config_dict(saved), sys_argv=argv
    )
    return
  if path and not os.path.isfile(path):
    others = glob.glob(os.path.join(os.path.dirname(path), "*.py"))
    hint = f"; {nearest(path, others)}" if others else ""
    raise UserError(f"config file {path} does not exist{hint}")
  config_flags.DEFINE_config_file(
    "config",
    help_string="Config file, as FILE or FILE:ARGUMENT.",
    sys_argv=argv,
  )


class _OrNone(flags.ArgumentParser):
  """Makes a flag parser accept None as well.

  Whether the field allows None is checked when the config is built.
  """

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser
    self.syntactic_help = parser.syntactic_help

  def parse(self, argument: Any) -> Any:
    return None if argument == "None" else self._parser.parse(argument)

  def flag_type(self) -> str:
    return self._parser.flag_type()


def _describe(error: BaseException, path: str | None) -> str:
  """Describes a mistake, with the config file's line if it is in there."""
  # Flag parsers wrap what a config file raises: search the whole chain for the
  # innermost line of that file.
  chain = [error]
  while chain[-1].__context__ is not None:
    chain.append(chain[-1].__context__)
  for cause in chain if path else ():
    if isinstance(cause, SyntaxError):
      return f"{cause.filename}, line {cause.lineno}: {cause.msg}"
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if os.path.abspath(frame.filename) == os.path.abspath(path):
        return f"{path}, line {frame.lineno}: {_cause(cause)}"
  if isinstance(error, IndexError):
    return "--config.stages[...]: there is no stage with this index"
  if "get_config" in str(chain[-1]):
    return f"{path}: {_one_line(chain[-1])}; see configs/quickstart.py"
  return _one_line(error)


def _cause(error: BaseException) -> str:
  message = _one_line(error)
  found = re.match("cannot import name '(.+?)' from '(.+?)'", message)
  name = f"{found[2]}.{found[1]}" if found else getattr(error, "name", None)
  return f"{name} has moved to {_MOVED[name]}" if name in _MOVED else message


def _one_line(error: BaseException) -> str:
  text = " ".join(str(part) for part in error.args) or repr(error)
  return " ".join(text.split())
