"""Reads prompts from a text or JSON Lines file, one per line.

A line is a prompt or template (`template.py`). An empty line is an empty
prompt, so line n is always prompt n. In a .jsonl file a line is {"prompt":
"text"}, whose text may contain newlines; other keys are ignored.
"""

import json
import sys

from etils import epath

from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError

STDIN = "-"


def read(path: str) -> list[str]:
  """Returns the prompts in a file, or in stdin if the path is "-".

  Invalid UTF-8 is kept as surrogates, for which `template.parse` raises an
  error that names the prompt.

  Raises:
    UserError: the file can't be read or is empty, or a line of a .jsonl file
      is not a JSON object with a prompt.
  """
  # utf-8-sig drops the byte order mark that some editors write.
  text = _bytes(path).decode("utf-8-sig", "surrogateescape")
  # The newline at the end of a file does not begin another prompt.
  lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
  if lines == [""]:
    raise UserError(f"--prompts={path} is empty: write one prompt per line")
  if not path.lower().endswith(".jsonl"):
    return lines
  return [_of_json(line, path, n) for n, line in enumerate(lines, start=1)]


def _bytes(path: str) -> bytes:
  if path != STDIN:
    try:
      return epath.Path(path).expanduser().read_bytes()
    except OSError as error:
      raise UserError(f"--prompts={path}: {error.strerror}") from error
  if distributed.count() > 1:
    raise UserError(
      "--prompts=- works with one process only; give several a file"
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
      f'--prompts={path}, line {number}: expected {{"prompt": "text"}}'
    )
  return prompt
