"""Templates: which tokens are given, which are free, and what is refused."""

import pydoc_data.topics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.sampling import template as templates
from mdm_jax.sampling.template import canvas, escape, fit, parse

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:30]
KINDS = ("byte", "char", "sentencepiece")
HARD = (
  "",
  " ",
  "\n\n",
  "[MASK]",
  "[MASK:5] [MASK:*]",
  "\\[MASK]\\\\[MASK:x]",
  "[mask] MASK] [MAS",
  "\u2581 <unk> \u4e2d\U0001f600",
)


@pytest.fixture(scope="module")
def built():
  return {
    kind: tokenizers.build(TokenizerConfig(kind=kind, vocab_size=512), TEXTS)
    for kind in KINDS
  }


@pytest.fixture(params=KINDS)
def tokenizer(built, request):
  return built[request.param]


def _pieces(template, tokenizer):
  """Given texts and numbers of holes, in order."""
  found, ids = [], []
  for i, free in zip(template.tokens.tolist(), template.free, strict=True):
    assert free == (i == tokenizer.vocab.mask)
    if free:
      if ids:
        found.append(tokenizer.decode(ids))
        ids = []
      holes = found.pop() if found and isinstance(found[-1], int) else 0
      found.append(holes + 1)
    else:
      ids.append(i)
  return [*found, tokenizer.decode(ids)] if ids else found


# MARK: what is given


@pytest.mark.parametrize("text", [*TEXTS, "", "a  b ", "no hole: [MAS]"])
def test_a_prompt_is_given_whole_and_grows(tokenizer, text):
  template = parse(text, tokenizer)
  given = text.removesuffix(" ") if tokenizer.kind == "sentencepiece" else text
  assert template.tokens.tolist() == tokenizer.encode(given).tolist()
  assert not template.free.any() and template.grows


@pytest.mark.parametrize("text", ["The", "a.\n", ""])
def test_found_B9_a_space_at_the_end_is_the_same_with_and_without_a_hole(
  tokenizer, text
):
  for spaces in ("", " ", "  "):
    plain = parse(text + spaces, tokenizer)
    hole = parse(f"{text}{spaces}[MASK:*]", tokenizer)
    assert plain.tokens.tolist() == hole.tokens.tolist()
    assert plain.grows == hole.grows
  words = tokenizer.kind == "sentencepiece"
  assert words == (
    parse("The ", tokenizer).tokens.tolist()
    == parse("The", tokenizer).tokens.tolist()
  )


def test_a_space_before_a_hole_is_the_holes_own_where_words_have_theirs(built):
  text = "The [MASK] of  the [MASK:5] is"
  for kind in ("byte", "char"):
    found = _pieces(parse(text, built[kind]), built[kind])
    assert found == ["The ", 1, " of  the ", 5, " is"]
  tokenizer = built["sentencepiece"]
  found = _pieces(parse(text, tokenizer), tokenizer)
  assert found == ["The", 1, " of  the", 5, " is"]


@pytest.mark.parametrize(
  "text, expected",
  [
    ("[MASK]", [1]),
    ("[MASK] [MASK]", [2]),
    ("[MASK][MASK:3]", [4]),
    ("[MASK:12], so", [12, ", so"]),
    ("a  [MASK]", ["a ", 1]),  # two spaces: one is given
    ("a\n[MASK]", ["a\n", 1]),
    ("un[MASK]able", ["un", 1, "able"]),
    ("[MASK] ", [1, " "]),
    ("a [MASK:*]", ["a"]),
    ("[MASK:*]", []),
    ("[MASK:2] b [MASK:*]", [2, " b"]),
  ],
)
def test_pieces_of_words(built, text, expected):
  template = parse(text, built["sentencepiece"])
  assert _pieces(template, built["sentencepiece"]) == expected
  assert template.grows == text.endswith("[MASK:*]")


def test_the_words_around_a_hole_keep_their_tokens(built):
  """As in running text, so that the denoiser sees what it knows."""
  tokenizer = built["sentencepiece"]
  words = TEXTS[3].split(" ")[:40]
  whole = tokenizer.encode(" ".join(words)).tolist()
  for at in range(1, 40):
    template = parse(" ".join([*words[:at], "[MASK]", *words[at:]]), tokenizer)
    assert template.tokens[~template.free].tolist() == whole
    assert template.free.sum() == 1


@pytest.mark.parametrize("kind", KINDS)
@given(
  parts=st.lists(st.tuples(st.text(max_size=20), st.integers(1, 4)), max_size=4)
)
@example(parts=[("[MASK]", 1), (" ", 2), ("\\[MASK:x", 3)])
@settings(deadline=None, max_examples=60)
def test_given_text_comes_back_exactly(built, kind, parts):
  tokenizer = built[kind]
  given_texts = [text + "." for text, _ in parts]
  text = "".join(
    escape(given_text) + f"[MASK:{holes}]"
    for given_text, (_, holes) in zip(given_texts, parts, strict=True)
  )
  template = parse(text, tokenizer)
  assert tokenizer.decode(template.tokens) == "".join(given_texts)
  assert template.free.sum() == sum(holes for _, holes in parts)
  assert template.grows == (not parts)
  expected = [
    x for t, (_, n) in zip(given_texts, parts, strict=True) for x in (t, n)
  ]
  assert _pieces(template, tokenizer) == expected


# MARK: escapes


@pytest.mark.parametrize("text", HARD)
def test_an_escaped_text_is_a_prompt(tokenizer, text):
  template = parse(escape(text), tokenizer)
  assert not template.free.any() and template.grows
  words = tokenizer.kind == "sentencepiece"
  given = text.removesuffix(" ") if words else text
  assert tokenizer.decode(template.tokens) == given


@given(
  parts=st.lists(st.sampled_from(["\\", "[MASK", "]", ":5", " a"]), max_size=12)
)
@settings(deadline=None, max_examples=300)
def test_any_escaped_text_is_a_prompt(built, parts):
  text = "".join(parts)
  template = parse(escape(text), built["byte"])
  assert built["byte"].decode(template.tokens) == text
  assert not template.free.any()


@pytest.mark.parametrize(
  "text, expected",
  [
    ("\\[MASK]", ["[MASK]"]),
    ("\\\\[MASK]", ["\\", 1]),
    ("\\\\\\[MASK:5]", ["\\[MASK:5]"]),
    ("\\[MASK\\[MASK][MASK]", ["[MASK[MASK]", 1]),
    ("\\n \\\\ [MASK]", ["\\n \\\\ ", 1]),
    ("[MASK]\\[MASK", [1, "[MASK"]),
  ],
)
def test_backslashes(built, text, expected):
  assert _pieces(parse(text, built["byte"]), built["byte"]) == expected


# MARK: lengths


def test_a_pattern_ends_in_padding_and_a_prompt_in_holes(tokenizer):
  v = tokenizer.vocab
  rows = canvas(["ab", "[MASK]b", "", "a[MASK:2][MASK:*]"], tokenizer, 9)
  width = len(tokenizer.encode("ab"))
  assert rows.tokens.dtype == np.int32 and rows.tokens.shape == (4, 9)
  assert rows.lengths.tolist() == [9, 1 + len(tokenizer.encode("b")), 9, 9]
  assert rows.free[0].tolist() == [False] * width + [True] * (9 - width)
  assert np.all(rows.tokens[1, rows.lengths[1] :] == v.pad)
  assert rows.free.sum(axis=1).tolist()[1:3] == [1, 9]
  assert np.array_equal(rows.free, rows.tokens == v.mask)
  assert tokenizer.decode(rows.tokens[0]) == "ab"
  assert tokenizer.decode(rows.tokens[1]) == "b"


def test_a_row_may_be_full(built):
  tokenizer = built["byte"]
  row = fit(parse("abc[MASK]", tokenizer), 4, tokenizer.vocab)
  assert row.free.tolist() == [False] * 3 + [True] and not row.grows
  row = fit(parse("abc[MASK][MASK:*]", tokenizer), 4, tokenizer.vocab)
  assert row.free.sum() == 1
  assert fit(parse("abc", tokenizer), 4, tokenizer.vocab).free.sum() == 1


def test_no_text_gives_no_row(built):
  rows = canvas([], built["byte"], 5)
  assert rows.tokens.shape == rows.free.shape == (0, 5)
  assert rows.lengths.shape == (0,)


# MARK: what is refused


@pytest.mark.parametrize(
  "text, named",
  [
    ("a [MASK:0] b", "[MASK:0]"),
    ("[MASK:x]", "[MASK:x]"),
    ("[MASK:-1]", "[MASK:-1]"),
    ("[MASK:]", "[MASK:]"),
    ("[MASK:05]", "[MASK:05]"),
    ("[MASK:1000000]", "[MASK:1000000]"),
    ("[MASK 5]", "[MASK"),
    ("[MASKED]", "[MASKED]"),
    ("[MASK:5 and so on", "[MASK:5"),
    ("the [MASK", "[MASK"),
    ("[MASK:" + "9" * 5000 + "]", "[MASK:"),
  ],
)
def test_a_hole_written_wrongly_is_named(built, text, named):
  with pytest.raises(UserError) as error:
    parse(text, built["byte"])
  told = str(error.value)
  assert told.startswith(f"{named}") and "is not a valid mask" in told
  assert "[MASK:5]" in told and "[MASK:*]" in told
  assert "\n" not in told and len(told) < 250


@pytest.mark.parametrize("text", ["[MASK:*] b", "[MASK:*][MASK:*]"])
def test_the_rest_is_at_the_end_only(built, text):
  with pytest.raises(UserError, match=r"\[MASK:\*\] fills the rest"):
    parse(text, built["byte"])


@pytest.mark.parametrize(
  "text, takes, by",
  [("abcdef", 6, 3), ("ab[MASK:3]", 5, 1), ("a[MASK:4][MASK:*]", 5, 1)],
)
def test_too_long_a_text_says_by_how_much(built, text, takes, by):
  tokenizer = built["byte"]
  told = f"prompt has {takes} tokens and a sample only 4; shorten it by {by} "
  with pytest.raises(UserError, match=told):
    canvas([text], tokenizer, 4)
  assert canvas([text], tokenizer, 4 + by).free.any()
  if not text.endswith("]"):
    with pytest.raises(UserError):
      canvas([text], tokenizer, 4 + by - 1)


@pytest.mark.parametrize("text", ["abcd", "abcd[MASK:*]"])
def test_a_text_that_leaves_nothing_to_draw_is_reported(built, text):
  with pytest.raises(UserError, match="all 4 tokens .* nothing to draw"):
    canvas([text], built["byte"], 4)


def test_of_several_texts_the_wrong_one_is_named(built):
  with pytest.raises(UserError, match=r"^prompt 2 of 3: \[MASK:x\] is not"):
    canvas(["a", "[MASK:x]", "[MASK:y]"], built["byte"], 4)


def test_a_model_that_writes_no_space_into_words_is_recognised(built):
  found = {k: templates._spaces_begin_words(t) for k, t in built.items()}
  assert found == {"byte": False, "char": False, "sentencepiece": True}


# MARK: holes whose length is not told


def test_each_choice_of_lengths_is_a_told_template(tokenizer):
  text = "The [MASK:{}] of  the [MASK:{}] is [MASK]"
  found = templates.ways(text.format("1-3", "2-4"), tokenizer)
  sizes = [(a, b) for a in (1, 2, 3) for b in (2, 3, 4)]
  for one, told in zip(found, sizes, strict=True):
    want = parse(text.format(*told), tokenizer)
    assert one.tokens.tolist() == want.tokens.tolist()
    assert one.free.tolist() == want.free.tolist() and not want.untold.any()
    # Only in these holes.
    assert np.bincount(one.untold)[1:].tolist() == [*told]
    assert not ((one.untold > 0) & ~one.free).any()


def test_a_length_with_equal_bounds_is_told(tokenizer):
  (found,) = templates.ways("a[MASK:3-3]b", tokenizer)
  assert not found.untold.any() and found.free.sum() == 3


def test_rows_of_all_choices_are_text_by_text(built):
  texts = ["a[MASK:1-3]b", "ab", "[MASK:2]", "[MASK:1-2] [MASK:*]"]
  found = templates.candidates(texts, built["byte"], 9)
  assert found.counts.tolist() == [3, 1, 1, 2]
  assert found.canvas.lengths.tolist() == [3, 4, 5, 9, 2, 9, 9]
  assert found.untold.sum(axis=1).tolist() == [1, 2, 3, 0, 0, 1, 2]
  told = canvas(texts[1:3], built["byte"], 9)
  np.testing.assert_array_equal(found.canvas.tokens[3:5], told.tokens)


@pytest.mark.parametrize(
  "text, words",
  [
    ("[MASK:8-1]", r"\[MASK:8-1\] has no length; write \[MASK:1-8\]"),
    ("[MASK:0-5]", r"\[MASK:0-5\] is not a valid mask; .*\[MASK:1-8\]"),
    ("[MASK:1-]", r"\[MASK:1-\] is not a valid mask"),
    ("[MASK:1-*]", r"\[MASK:1-\*\] is not a valid mask"),
    (
      "[MASK:1-600]",
      r"600 choices .* nearest valid: at most 512, such as \[MASK:1-512\]",
    ),
    ("[MASK:2-9] " * 4, r"4,096 choices .* such as \[MASK:2-5\] for each"),
    ("a[MASK:1-30]b", r"has 32 tokens and a sample only 24"),
  ],
)
def test_bounds_without_a_length_are_refused_in_one_line(built, text, words):
  with pytest.raises(UserError, match=words) as error:
    templates.candidates([text], built["byte"], 24)
  assert "\n" not in str(error.value)


def test_a_told_length_is_needed_where_nothing_decides_it(built):
  with pytest.raises(UserError, match="prompt 2 of 2: .* is not told"):
    canvas(["a", "[MASK:1-2]"], built["byte"], 9)


def test_a_text_fills_a_hole_if_it_is_within_the_bounds(built):
  fill = lambda text: templates.filled("a[MASK:2-3]b", text, built["byte"])
  assert fill("xy").free.tolist() == [False, True, True, False]
  assert fill("xyz").free.sum() == 3
  with pytest.raises(UserError, match=r"2 to 3 token\(s\) and the text 4"):
    fill("wxyz")
