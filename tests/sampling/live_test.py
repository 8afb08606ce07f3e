"""The live view in the terminal: what it shows, and late or early steps."""

import io
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.sampling.live import LiveView

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
V = BYTES.vocab
M, E, P = V.mask, V.end, V.pad
BLOCK = "\u2591"


def _row(text):
  """A row: _ is a mask, $ the end, # padding."""
  special = {"_": M, "$": E, "#": P}
  return [special.get(c, ord(c)) for c in text]


def _rows(*texts):
  return np.array([_row(text) for text in texts], np.int32)


def _view(terminal=False, num_steps=3, rows=1, width=80):
  console = Console(
    file=io.StringIO(),
    force_terminal=terminal,
    color_system="truecolor" if terminal else None,
    width=width,
    highlight=False,
  )
  return LiveView(BYTES, num_steps, rows, console), console.file


STEPS = ("ab____", "ab_d__", "abcd__", "ab_de$")


def test_without_terminal_a_line_a_step_and_the_text_at_the_end():
  view, file = _view()
  with view:
    for step, text in enumerate(STEPS):
      view.show(step, _rows(text))
  assert file.getvalue().splitlines() == [
    "step 0/3: 2 of 6 tokens",
    "step 1/3: 1 new, 3 of 6 tokens",
    "step 2/3: 1 new, 4 of 6 tokens",
    "step 3/3: 2 new, 1 remasked, 5 of 6 tokens",
    f"ab{BLOCK}de\u27e8end\u27e9",
  ]


def test_older_steps_are_left_out():
  view, file = _view()
  with view:
    for step in (0, 2, 1, 2, 3, 0):
      view.show(step, _rows(STEPS[step]))
  lines = file.getvalue().splitlines()
  assert [line[:6] for line in lines[:-1]] == ["step 0", "step 2", "step 3"]
  assert lines[1] == "step 2/3: 2 new, 4 of 6 tokens"
  assert lines[-1] == f"ab{BLOCK}de\u27e8end\u27e9"


def test_nothing_is_shown_before_or_after():
  view, file = _view()
  view.show(0, _rows(STEPS[0]))
  with view:
    pass
  view.show(1, _rows(STEPS[1]))
  assert file.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_it_closes_after_an_error(terminal):
  view, file = _view(terminal)
  with pytest.raises(KeyError), view:
    view.show(0, _rows("ab__"))
    raise KeyError
  view.show(1, _rows("abcd"))
  assert "abcd" not in file.getvalue()
  assert threading.active_count() < 50


@pytest.mark.parametrize("terminal", [False, True])
def test_a_view_may_be_used_again(terminal):
  view, file = _view(terminal)
  for last in ("abcd", "efgh"):
    with view:
      view.show(0, _rows("____"))
      view.show(3, _rows(last))
  assert file.getvalue().count("step 3/3: 4 new, 4 of 4 tokens") == 2
  assert file.getvalue().count("efgh\n") == 1


def test_only_the_first_rows_are_shown():
  view, file = _view(rows=2)
  with view:
    view.show(1, _rows("ab", "c_", "xy"))
  lines = file.getvalue().splitlines()
  assert lines == ["step 1/3: 3 of 4 tokens", "ab", "", f"c{BLOCK}"]


def test_padding_and_what_is_behind_the_end_are_not_shown():
  view, file = _view(rows=2)
  with view:
    view.show(1, _rows("a$_x", "a###"))
  lines = file.getvalue().splitlines()
  assert lines[0] == "step 1/3: 4 of 5 tokens"
  assert lines[1:] == ["a\u27e8end\u27e9", "", "a"]


def test_on_a_terminal_new_tokens_are_marked():
  view, file = _view(terminal=True)
  with view:
    for step, text in enumerate(STEPS):
      view.show(step, _rows(text))
      view._live.refresh()
  frames = file.getvalue()
  new = "\x1b\\[38;2;26;29;41;48;2;255;210;74m"  # ink on yellow
  # Rich may end and begin a style between two tokens of one.
  marked = re.findall(rf"{new}(.*?)\x1b\[0m", frames)
  assert [text for text in marked if text in "abcd"] and "c" in marked
  assert "d" in marked and "a" not in marked
  assert f"\x1b[2m{BLOCK}" in frames
  last = frames[frames.rindex("step 3/3") :]
  assert "2 new, 1 remasked, 5 of 6 tokens" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_a_text_can_do_nothing_to_the_terminal(terminal):
  view, file = _view(terminal)
  with view:
    view.show(0, _rows("\x1b]0;owned\x07\r\x9b[bold]x[/bold][/]"))
  shown = file.getvalue()
  assert "\x1b]" not in shown and "\x07" not in shown and "\r\x9b" not in shown
  assert "\u241b]0;owned\u2407\u240d" in shown
  assert "[bold]x[/bold][/]" in shown


def test_pieces_of_words_are_blocks_with_a_space():
  config = TokenizerConfig(kind="sentencepiece", vocab_size=330)
  tokenizer = tokenizers.build(config, ["We the people of the land. " * 50])
  console = Console(file=io.StringIO(), width=80)
  ids = [*tokenizer.encode("We"), *[tokenizer.vocab.mask] * 2]
  with LiveView(tokenizer, 1, console=console) as view:
    view.show(0, np.array([ids], np.int32))
  last = console.file.getvalue().splitlines()[-1]
  assert last == f"We {BLOCK * 3} {BLOCK * 3}"


def test_half_a_character_is_replaced():
  view, file = _view()
  half = np.array([["\u00e9".encode()[0], M]], np.int32)
  with view:
    view.show(0, half)
  assert file.getvalue().splitlines()[-1] == f"\ufffd{BLOCK}"


def test_a_jitted_loop_shows_its_steps():
  """As a sampler calls it."""
  final = jnp.asarray(_rows("abcdef", "ghijkl"))

  @jax.jit
  def run(x):
    def step(i, x):
      x = jnp.where(jnp.arange(6)[None] == i, final, x)
      jax.debug.callback(view.show, i + 1, x)
      return x

    return jax.lax.fori_loop(0, 6, step, x)

  view, file = _view(num_steps=6)
  with view:
    run(jnp.full((2, 6), M, jnp.int32))
  lines = file.getvalue().splitlines()
  assert lines[-1] == "abcdef"
  assert lines[-2].startswith("step 6/6: ")


@pytest.mark.parametrize("terminal", [False, True])
def test_leaving_waits_for_the_last_step(terminal, monkeypatch):
  """On a processor beside this one, it comes when the loop has been left."""
  view, file = _view(terminal)
  last = lambda: view.show(3, _rows("abcd"))
  monkeypatch.setattr(jax, "effects_barrier", last)
  with view:
    view.show(2, _rows("ab__"))
  assert "step 3/3: 2 new, 4 of 4 tokens\nabcd\n" in file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_threads_may_call_at_once(terminal):
  view, file = _view(terminal, num_steps=200)
  calls = [
    threading.Thread(target=view.show, args=(i, _rows(f"{i:04d}")))
    for i in range(200)
  ]
  with view:
    for call in calls:
      call.start()
    for call in calls:
      call.join()
  shown = re.findall(r"step (\d+)/200", file.getvalue())
  numbers = [int(number) for number in shown]
  assert numbers == sorted(numbers) and numbers[-1] == 199
  assert "0199" in file.getvalue()
