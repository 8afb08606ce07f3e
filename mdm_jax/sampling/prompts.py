"""Prompts from a file: one a line, or one a line of JSON.

A line is a prompt as `template.py` reads it, and an empty one asks for free
text, so that line n is always prompt n. In a .jsonl file a prompt may hold
newlines: a line is {"prompt": "text"}, and what else it holds is not read.
"""

import json
import sys

from etils import epath

from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import at_home

STDIN = "-"


def read(path: str) -> list[str]:
  """Returns the prompts of a file, or of stdin where the path is "-".

  What is no UTF-8 is kept as surrogates, which `template.parse` refuses.

  Raises:
    UserError: it can't be read or has no prompt, or a line of JSON has none.
  """
  text = _bytes(path).decode("utf-8-sig", "surrogateescape")
  lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
  if lines == [""]:
    raise UserError(f"--prompts={path} has no prompt: write one a line")
  if not path.lower().endswith(".jsonl"):
    return lines
  return [_of_json(line, path, n) for n, line in enumerate(lines, start=1)]


def _bytes(path: str) -> bytes:
  if path != STDIN:
    try:
      return epath.Path(at_home(path)).read_bytes()
    except OSError as error:
      raise UserError(f"--prompts={path}: {error.strerror}") from error
  if distributed.count() > 1:
    raise UserError(
      "--prompts=- is the input of one process; several take a file"
    )
  return sys.stdin.buffer.read()


def _of_json(line: str, path: str, number: int) -> str:
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    value = None
  prompt = value.get("prompt") if isinstance(value, dict) else None
  if not isinstance(prompt, str):
    raise UserError(
      f'--prompts={path}, line {number}: it is not {{"prompt": "text"}}'
    )
  return prompt
