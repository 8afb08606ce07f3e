"""Conversations as a corpus: `chat:PATH`, lines of JSON with answers.

A line is {"messages": [{"role": "user", "content": "..."}, ...]}, in which
every message of the role "assistant" is an answer, or {"prompt": "...",
"completion": "..."}, which is one exchange, verbatim. A folder stands for the
.jsonl files in it.

Messages are written by the chat template of the tokenizer's folder, or by a
plain one: each message below its role, a blank line between them, and an
end-of-text id behind an answer.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from mdm_jax.core.errors import UserError
from mdm_jax.data import answers, text_files
from mdm_jax.data.chat_template import ChatTemplate, TemplateError
from mdm_jax.data.config import DataConfig, TokenizerConfig
from mdm_jax.data.text_files import Files
from mdm_jax.huggingface import folder as folders

ASSISTANT = "assistant"
_PLAIN = "plain"
_FORMS = '{"messages": [...]} or {"prompt": "...", "completion": "..."}'
Messages = list[dict[str, str]]


def files(path: str) -> Files:
  """Returns the files of a path: one, a pattern's, or a folder's .jsonl."""
  folder = pathlib.Path(path).expanduser()
  found = text_files.find(f"{path}/**/*.jsonl" if folder.is_dir() else path)
  for file in found[0]:
    if (
      not file.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    ):
      raise UserError(
        f"data.corpus=chat:{path}: {file} is not a .jsonl file; each line of"
        f" one is {_FORMS}"
      )
  return found


def settle(
  data: DataConfig, tokenizer: TokenizerConfig, init_from: str
) -> DataConfig:
  """Returns the config with the path of the chat template to use.

  Unless the config names one, it is that of the tokenizer's folder, if there is
  one.
  """
  corpora = data.corpus, data.validation_corpus, data.test_corpus
  if data.chat_template or not any(c.startswith("chat:") for c in corpora):
    return data
  path = ""
  if folders.is_named(init_from):
    path = init_from.removeprefix("hf:")
  elif not init_from and tokenizer.kind == "huggingface" and tokenizer.path:
    path = str(pathlib.Path(tokenizer.path).parent)
  if not path or ChatTemplate.find(path) is None:
    return data
  return dataclasses.replace(data, chat_template=path)


def reader(data: DataConfig) -> Callable[[bytes], str]:
  """Returns the function from a line to a document with answers.

  It raises ValueError with the reason if a line is no conversation.

  Raises:
    UserError: the chat template can't be read.
  """
  given = data.chat_template
  template = None if given in ("", _PLAIN) else _template(given)
  return functools.partial(_read, template)


@functools.lru_cache
def _template(path: str) -> ChatTemplate:
  # Compiled once per process; every block of a large corpus asks for it.
  found = ChatTemplate.find(path)
  if found is None:
    raise UserError(
      f"data.chat_template={path} has no chat template: give a .jinja file, a"
      " folder with chat_template.jinja or tokenizer_config.json, or plain"
    )
  return found


def _read(template: ChatTemplate | None, line: bytes) -> str:
  try:
    found = json.loads(line.decode())
  except UnicodeDecodeError as e:
    raise ValueError(f"not valid UTF-8 ({e.reason})") from None
  except (ValueError, RecursionError) as e:
    why = getattr(e, "msg", None) or str(e)
    raise ValueError(f"not valid JSON ({why})") from None
  if not isinstance(found, dict):
    raise ValueError(f"not an object; each line is {_FORMS}")
  if "messages" in found:
    messages = _messages(found["messages"])
    for number, message in enumerate(messages, 1):
      _check(message["content"], f"the content of message {number}", template)
    return render(messages, template)
  missing = [key for key in ("prompt", "completion") if key not in found]
  if missing:
    keys = ", ".join(json.dumps(key) for key in [*found][:9]) or "no key"
    raise ValueError(f'no "messages" and no "{missing[0]}", but {keys}')
  for key in ("prompt", "completion"):
    _check(found[key], f'"{key}"', template)
  if not found["completion"]:
    raise ValueError('"completion" is empty: there is nothing to predict')
  return answers.exchange(found["prompt"], found["completion"])


def _messages(given: Any) -> Messages:
  if not isinstance(given, list) or not given:
    raise ValueError('"messages" is not a list of messages')
  for number, message in enumerate(given, 1):
    for key in ("role", "content"):
      text = message.get(key) if isinstance(message, dict) else None
      if not isinstance(text, str):
        raise ValueError(f'message {number} has no "{key}" with a string')
    if message["role"] == ASSISTANT and not message["content"]:
      raise ValueError(
        f"message {number} is an empty answer: there is nothing to predict"
      )
  if given[-1]["role"] != ASSISTANT:
    raise ValueError(
      f"the last message is of the role {given[-1]['role']!r}, not"
      f" {ASSISTANT!r}: it has no answer"
    )
  return given


def _check(text: Any, name: str, template: ChatTemplate | None) -> None:
  """Raises ValueError if a text would be read as something else than text."""
  if not isinstance(text, str):
    raise ValueError(f"{name} is not a string")
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f"half of a surrogate pair in {name}") from None
  if answers.has_marks(text):
    raise ValueError(f"{name} has a control character (STX, ETX, ETB or SUB)")
  for special in template.names if template else ():
    if special in text:
      raise ValueError(
        f"{name} has {special}, a special token of the chat template"
      )


def render(messages: Messages, template: ChatTemplate | None) -> str:
  """Returns a conversation as a document with answers.

  Raises:
    ValueError: the template refuses it.
  """
  if template is None:
    return _plain(messages)
  try:
    return template.document(messages)
  except TemplateError as error:
    raise ValueError(str(error)) from None


def _plain(messages: Messages) -> str:
  parts = []
  for message in messages:
    role, content = message["role"], message["content"]
    if role == ASSISTANT:
      parts.append(answers.exchange(f"{role}\n", content))
    else:
      parts.append(f"{role}\n{content}\n\n")
  return "".join(parts)
