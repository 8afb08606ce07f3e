"""Chat templates: Jinja programs that write a conversation as text.

They come with a tokenizer, and are run in Jinja's sandbox with the settings,
filters and functions of Hugging Face's transformers, so that they write the
same text. `strftime_now` is missing: rows must not depend on the day, and
templates that use it have a fixed date beside it.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.data import answers
from mdm_jax.huggingface.folder import Folder

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TemplateError(Exception):
  """A template that can't write a conversation; the message says why."""


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}: what the assistant writes."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> Any:
    """Calls `_mark` with what is inside."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
    call = self.call_method("_mark", lineno=line)
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return f"{answers.BEGIN}{caller()}{answers.CLOSE}"


class ChatTemplate:
  """A chat template with the special tokens of its tokenizer.

  Attributes:
    names: texts of the special tokens, which no message may contain.
  """

  def __init__(
    self, source: str, special: Mapping[str, str], names: Sequence[str] = ()
  ):
    """Compiles the template.

    Args:
      source: the template.
      special: the variables bos_token, eos_token and so on.
      names: texts of all special tokens.

    Raises:
      UserError: the source is not valid Jinja.
    """
    self.names = tuple(dict.fromkeys((*names, *special.values())))
    self._special = special
    self._marks = "endgeneration" in source
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise UserError(f"the chat template is not valid: {error}") from None

  @classmethod
  def find(cls, path: str) -> "ChatTemplate | None":
    """Returns the template of a folder or a file; None if it has none.

    Raises:
      UserError: a file can't be read, or the template is not valid.
    """
    at = pathlib.Path(path).expanduser()
    source = None
    if at.is_file() and at.suffix != ".gguf":
      source, at = safe_files.read_bytes(at).decode(errors="replace"), at.parent
    folder = Folder(at, {})
    config = folder.json("tokenizer_config.json") or {}
    source = source or from_files(folder)
    if not source:
      return None
    special = {f"{n}_token": _text(config.get(f"{n}_token")) for n in _SPECIAL}
    special = {name: text for name, text in special.items() if text}
    return cls(source, special, _names(folder, config))

  def render(
    self, messages: Sequence[Mapping[str, str]], prompt: bool = False
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each with a role and a content.
      prompt: whether it ends where the assistant's next answer begins.

    Raises:
      TemplateError: the template refuses the conversation, or fails.
    """
    return answers.without_marks(self._render(messages, prompt))

  def _render(self, messages: Sequence[Any], prompt: bool = False) -> str:
    try:
      return self._template.render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=prompt,
        **self._special,
      )
    except TemplateError:
      raise
    except Exception as error:  # a template may do anything
      raise TemplateError(f"the chat template fails: {error}") from None

  def document(self, messages: Sequence[Mapping[str, str]]) -> str:
    """Returns a conversation as a document with answers.

    Answers are what is inside {% generation %}. A template without this block
    is asked for the text up to each answer and for the text with it; the answer
    is the difference, with its end.

    Raises:
      TemplateError: it refuses the conversation, or the text up to an answer
        isn't the beginning of the text with it.
    """
    text = self._render(messages)
    if self._marks:
      if not answers.are_in(text):
        raise TemplateError("the chat template marks no answer in it")
      return answers.until_last(text)
    found, at = [], 0
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      before = self._render(messages[:i], prompt=True)
      upto = self._render(messages[: i + 1])
      if not (upto.startswith(before) and text.startswith(upto)):
        raise TemplateError(
          f"the chat template writes message {i + 1} in another way when it is"
          " not the last one, so it can't be told where its answer is; give a"
          " template with {% generation %} around answers"
        )
      found += [text[at : len(before)], answers.BEGIN]
      found += [text[len(before) : len(upto)], answers.CLOSE]
      at = len(upto)
    return "".join(found)


def from_files(folder: Folder) -> str:
  """Returns the template in a tokenizer's folder, or ""."""
  given = (folder.json("tokenizer_config.json") or {}).get("chat_template")
  given = folder.text("chat_template.jinja") if given is None else given
  # Several templates are a list of {"name", "template"}.
  if isinstance(given, list):
    by_name = {t.get("name"): t.get("template") for t in given}
    given = by_name.get("default")
  return given if isinstance(given, str) else ""


def _names(folder: Folder, config: Mapping[str, Any]) -> list[str]:
  """Returns the texts of all tokens that are marked as special."""
  listed = config.get("added_tokens_decoder")
  known = [*listed.values()] if isinstance(listed, dict) else []
  known += (folder.json("tokenizer.json") or {}).get("added_tokens") or []
  return [
    token["content"]
    for token in known
    if isinstance(token, dict) and token.get("special") and token.get("content")
  ]


def _text(token: Any) -> str:
  token = token.get("content") if isinstance(token, dict) else token
  return token if isinstance(token, str) else ""


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # Not Jinja's own filter: that one escapes HTML.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> None:
  raise TemplateError(f"the chat template refuses it: {message}")
