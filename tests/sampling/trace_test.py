"""Traces of sampling: statistics, files, and the page in a browser."""

import dataclasses
import itertools
import json
import math
import time
from xml.etree import ElementTree

import browser_harness
import numpy as np
import pytest
from browser_harness import Page, visible_text
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core import files
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.evaluation.pages.picture import render as render_picture
from mdm_jax.evaluation.pages.samples import render as render_page
from mdm_jax.sampling import samples as samples_lib
from mdm_jax.sampling import trace
from mdm_jax.sampling.order_statistics import order_statistics
from mdm_jax.sampling.samples import Samples
from mdm_jax.sampling.trace import load, spell

NASTY = "</script><script>window.owned=1</script>&amp;<b onclick='x'>\"'$name"
TEXTS = (
  f"{NASTY}\n",
  "\u00e9\u4e2d\U0001f600 \0\x1b[31m\r\x9b ok\t.",
  "We the people of the United States",
)
STEPS = 12
SETTINGS = {"num_steps": STEPS, "temperature": 0.5, "top_k": None, "seed": 7}
BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
V = BYTES.vocab


def _simulate(tokenizer, texts=TEXTS, given=3, length=90, steps=STEPS, seed=0):
  """Draws given texts in random order, one token in four twice.

  Once its end is drawn, there is only padding behind a text.
  """
  rng, v = np.random.default_rng(seed), tokenizer.vocab
  shape = len(texts), length
  path = np.full((steps + 1, *shape), v.mask, np.int32)
  step = np.full(shape, -1, np.int32)
  put_back = np.zeros(len(texts), np.int32)
  for b, text in enumerate(texts):
    ids = np.append(tokenizer.encode(text), v.end)
    n = len(ids)
    assert n < length
    step[b, given:n] = rng.integers(2, steps, n - given)
    path[:, b, :given] = ids[:given]
    for l in range(given, n):
      path[step[b, l] + 1 :, b, l] = ids[l]
      if l % 4 == 0:
        path[1 : step[b, l], b, l] = rng.integers(0, 256)
        put_back[b] += step[b, l] > 1
    path[step[b, n - 1] + 1 :, b, n:] = v.pad
  drawn = step >= 0
  confidence = np.where(drawn, rng.uniform(size=shape), 0).astype(np.float32)
  entropy = np.where(drawn, rng.uniform(0, 5, shape), 0).astype(np.float32)
  calls = np.full(len(texts), steps, np.int32)
  return Samples(
    texts=list(texts),
    path=path,
    step=step,
    confidence=confidence,
    entropy=entropy,
    calls=calls,
    put_back=put_back,
  )


def _revealed(steps, given=()):
  """Samples with these last steps, -1 for given where listed, else cut off."""
  step = np.array([steps], np.int32)
  first = np.where(step >= 0, V.mask, V.pad)
  first[0, list(given)] = 65
  last = np.where(step >= 0, 65, first)
  zeros = np.zeros(step.shape, np.float32)
  count = np.zeros(1, np.int32)
  path = np.stack([first, last]).astype(np.int32)
  return Samples(
    texts=[""],
    path=path,
    step=step,
    confidence=zeros,
    entropy=zeros,
    calls=count,
    put_back=count,
  )


def _statistics(steps, given=()):
  found = order_statistics(_revealed(steps, given), V)
  return {k: (s.rows[0], s.random[0]) for k, s in found.items()}


def save(samples, tokenizer, settings, folder):
  pages = {"samples.html": render_page(samples, tokenizer, settings)}
  trace.save(samples, tokenizer, settings, pages, folder)


@pytest.fixture(scope="module")
def samples():
  return _simulate(BYTES)


# MARK: statistics


@pytest.mark.parametrize(
  "steps, tau",
  [
    ([0, 1, 2, 3], 1),
    ([3, 2, 1, 0], -1),
    ([1, 0, 3, 2], 1 / 3),
    ([0, 0, 1, 1], 4 / math.sqrt(6 * 4)),
    ([0, 9, 7, 8], 1 / 3),  # steps that reveal nothing do not count
    ([-1, 5, -1, 6, -1], 1),
  ],
)
def test_tau_of_known_orders(steps, tau):
  assert _statistics(steps)["kendall_tau"] == (pytest.approx(tau), 0)


@given(st.lists(st.integers(-1, 6), min_size=2, max_size=20))
@settings(deadline=None, max_examples=80)
def test_tau_is_its_definition(steps):
  known = [(i, s) for i, s in enumerate(steps) if s >= 0]
  pairs = list(itertools.combinations(known, 2))
  sign = lambda x: (x > 0) - (x < 0)
  score = sum(sign(t - s) for (_, s), (_, t) in pairs)
  untied = sum(s != t for (_, s), (_, t) in pairs)
  found, _ = _statistics(steps)["kendall_tau"]
  if untied:
    assert found == pytest.approx(score / math.sqrt(len(pairs) * untied))
  else:
    assert math.isnan(found)


def test_jump_of_known_orders():
  assert _statistics([0, 1, 2, 3])["jump"] == pytest.approx((1, 5 / 3))
  assert _statistics([0, 3, 1, 2])["jump"][0] == pytest.approx(5 / 3)
  # Of the first two, to the last two: 2, 3, 1 and 2.
  assert _statistics([0, 0, 5, 5])["jump"][0] == pytest.approx(2)
  assert _statistics([0, -1, -1, 1])["jump"] == pytest.approx((3, 3))
  assert np.isnan(_statistics([4, 4, 4])["jump"]).all()


def test_adjacent_of_known_orders():
  adjacent = lambda *args: _statistics(*args)["adjacent"]
  assert adjacent([0, 1, 2, 3])[0] == 3 / 4
  assert adjacent([0, 0, 1, 1])[0] == 1 / 4
  assert adjacent([0, 2, 1, 3])[0] == 1 / 2
  # A given neighbour is known; one that was cut off never is.
  assert adjacent([-1, 0, 0, -1], [0, 3]) == (1, 1)
  assert adjacent([-1, 0, -1, 1]) == (0, 0)
  assert adjacent([0, 1, -1], [2])[0] == 1 / 2


@pytest.mark.parametrize(
  "steps, given_at",
  [
    ([0, 1, 2, 3, 4], []),
    ([2, 2, 0, 1, 1, 0], []),
    ([0, -1, 1, 1, -1, 2], [1]),
    ([-1, 0, 3, 3, 4, -1], [0]),
    ([-1, 0, -1, 0, -1], [2]),
    ([0, 1], []),
    ([3], []),
  ],
)
def test_random_order_is_the_mean_over_all_orders(steps, given_at):
  """Each order of the same steps over the same positions, once."""
  where = [i for i, s in enumerate(steps) if s >= 0]
  expected = _statistics(steps, given_at)
  sums = {name: [] for name in expected}
  for order in itertools.permutations([steps[i] for i in where]):
    again = list(steps)
    for i, s in zip(where, order, strict=True):
      again[i] = s
    for name, (value, random) in _statistics(again, given_at).items():
      sums[name].append(value)
      assert random == pytest.approx(expected[name][1], nan_ok=True)
  for name, values in sums.items():
    if np.isnan(values).any():
      continue  # one step alone has no order
    assert np.mean(values) == pytest.approx(expected[name][1], abs=1e-9), name


def test_means_are_over_texts_that_have_a_number():
  parts = [_revealed(s) for s in ([0, 1, 2], [2, 1, 0], [1, 1, 1], [-1] * 3)]
  joined = samples_lib.join(parts)
  found = order_statistics(joined, V)
  assert found["kendall_tau"].rows[:2].tolist() == [1, -1]
  assert np.isnan(found["kendall_tau"].rows[2:]).all()
  assert found["kendall_tau"].mean == 0 and found["jump"].mean == 1
  assert found["adjacent"].mean == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
  nothing = order_statistics(_revealed([-1, -1]), V)
  assert all(math.isnan(s.mean) for s in nothing.values())


def test_the_vocabulary_tells_what_was_given():
  """The same ids are masks of a small vocabulary, and text of a large one."""
  path = np.array([[[7, 7]], [[1, 2]]])
  samples = dataclasses.replace(_revealed([0, 1]), path=path)
  adjacent = lambda v: order_statistics(samples, v)["adjacent"].rows[0]
  other = Vocabulary.after_text(4)
  assert adjacent(other) == 0.5 and other.mask == 7
  held = dataclasses.replace(samples, step=np.array([[-1, 1]]))
  assert adjacent(V) == 0.5
  assert order_statistics(held, V)["adjacent"].rows[0] == 1
  assert order_statistics(held, other)["adjacent"].rows[0] == 0


def test_random_samples_are_random(samples):
  many = _simulate(BYTES, ["abc " * 20] * 40, seed=1)
  for name, found in order_statistics(many, V).items():
    assert found.rows.shape == (40,)
    error = found.rows.std() / math.sqrt(40)
    assert abs(found.mean - found.random_mean) < 4 * error, name


# MARK: tokens as text


@given(st.binary(max_size=30), st.lists(st.integers(0, 29), max_size=6))
@settings(deadline=None, max_examples=200)
def test_tokens_are_spelt_as_they_are_decoded(content, masked):
  ids = list(content)
  assert "".join(spell(ids, BYTES)) == BYTES.decode(ids)
  for at in masked:
    if at < len(ids):
      ids[at] = V.mask
  found = spell(ids, BYTES)
  assert [t is None for t in found] == [i == V.mask for i in ids]
  # Between masks, text is text.
  for is_mask, run in itertools.groupby(
    zip(ids, found, strict=True), lambda pair: pair[0] == V.mask
  ):
    run = list(run)
    if not is_mask:
      told = "".join(text for _, text in run)
      assert told == bytes(i for i, _ in run).decode(errors="replace")


def test_half_a_character_and_special_ids():
  e = list("\u00e9".encode())
  assert spell([*e, 65], BYTES) == ["", "\u00e9", "A"]
  assert spell([e[0], V.mask, e[1]], BYTES) == ["\ufffd", None, "\ufffd"]
  found = spell([V.end, V.separator, V.pad, V.size - 1], BYTES)
  assert found == ["\u27e8end\u27e9", "\u27e8sep\u27e9", "", "\u27e8?\u27e9"]


# MARK: the picture


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_the_picture_shows_at_every_step_what_is_known(samples, row):
  """A class says from which step on an element is seen, and until which."""
  picture = render_picture(samples, BYTES, row)
  pieces = [
    (element.text, *map(int, span[1].split("-")))
    for element in ElementTree.fromstring(picture)
    if (span := element.get("class", "").rsplit(" s"))[1:]
  ]
  for k in range(STEPS + 1):
    seen = [
      t for t, since, until in pieces if since <= k < (until or STEPS + 1)
    ]
    spelt = spell(samples.path[k, row].tolist(), BYTES)
    want = [t and trace.visible(t).strip() for t in spelt]
    assert seen == [t for t in want if t != ""]
    known = sum(i not in (V.mask, V.pad) for i in samples.path[k, row])
    assert f"call {k} of {STEPS}: {known} of" in picture


# MARK: files


def test_saved_and_loaded_they_are_the_same(samples, tmp_path):
  folder = tmp_path / "new" / "samples"
  save(samples, BYTES, SETTINGS, folder)
  names = {"samples.npz", "samples.json", "samples.html"}
  assert {p.name for p in folder.iterdir()} == names
  loaded, told = load(folder)
  assert told == SETTINGS and loaded.texts == samples.texts
  for name in samples_lib.ARRAYS:
    ours, theirs = getattr(loaded, name), getattr(samples, name)
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
  page = (folder / "samples.html").read_text("utf-8")
  assert page == render_page(samples, BYTES, SETTINGS)
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  save(loaded, BYTES, told, folder)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_script_finds_what_it_needs(samples, tmp_path):
  odd = SETTINGS | {
    "rate": np.float32(0.5),
    "range": (1, 2),
    "p": "\udc80\u00e9",
  }
  save(samples, BYTES, odd, tmp_path)
  told = json.loads((tmp_path / "samples.json").read_text("utf-8"))
  assert told["settings"]["rate"] == 0.5
  assert told["settings"]["range"] == [1, 2]
  assert told["settings"]["p"] == "\udc80\u00e9"
  assert told["tokenizer_sha256"] == BYTES.sha256
  assert told["put_back"] == samples.put_back.tolist()
  end = "\u27e8end\u27e9"
  assert ["".join(p) for p in told["pieces"]] == [t + end for t in TEXTS]
  found = order_statistics(samples, V)["jump"]
  assert told["order"]["jump"]["rows"] == pytest.approx(found.rows, abs=1e-6)
  assert told["order"]["jump"]["random"] == pytest.approx(
    found.random.mean(), abs=1e-6
  )
  with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
    assert np.array_equal(arrays["path"], samples.path)


def test_a_number_that_means_nothing_is_none(tmp_path):
  save(_revealed([-1, -1], [0]), BYTES, {}, tmp_path)
  text = (tmp_path / "samples.json").read_text()
  assert "NaN" not in text
  nothing = {"mean": None, "random": None, "rows": [None]}
  assert json.loads(text)["order"]["jump"] == nothing


def test_a_crash_leaves_the_old_files(samples, tmp_path, monkeypatch):
  save(samples, BYTES, SETTINGS, tmp_path)
  write, done = files.write, []

  def fail(path, content):
    if done:
      path = path.parent / "gone" / path.name  # no such folder
    done.append(path)
    write(path, content)

  monkeypatch.setattr(files, "write", fail)
  changed = dataclasses.replace(samples, calls=samples.calls + 1)
  with pytest.raises(StorageError, match=str(tmp_path)):
    save(changed, BYTES, SETTINGS, tmp_path)
  assert len(done) == 2  # the arrays are new, the rest is old
  with pytest.raises(UserError, match="do not match"):
    load(tmp_path)
  assert json.loads((tmp_path / "samples.json").read_bytes())["calls"] == (
    samples.calls.tolist()
  )


def test_files_that_are_not_there_or_damaged_are_reported(samples, tmp_path):
  with pytest.raises(UserError, match="holds no samples.npz"):
    load(tmp_path)
  save(samples, BYTES, SETTINGS, tmp_path)
  for content in (b"{", b"[]", b"{}", b"\xff"):
    (tmp_path / "samples.json").write_bytes(content)
    with pytest.raises(UserError, match="samples.json is damaged"):
      load(tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match="file"):
    save(samples, BYTES, SETTINGS, tmp_path / "file")


# MARK: what the page says


def _now(changes, step):
  """What the data says is there after a step."""
  return [c for c in changes if c[0] <= step][-1][1]


def _tokens(page):
  """The data of each text's tokens."""
  rows = []
  for tag, values in Page(page).tags:
    rows += [[]] if tag == "article" else []
    if tag == "span" and "data-changes" in values:
      rows[-1].append(values | {"changes": json.loads(values["data-changes"])})
  return rows


def _expected(samples, tokenizer, row, step):
  ids = samples.path[step, row].tolist()
  found = [t and trace.visible(t) for t in spell(ids, tokenizer)]
  pad = tokenizer.vocab.pad
  return [False if i == pad else t for i, t in zip(ids, found, strict=True)]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_the_pages_data_is_the_samples(kind):
  config = TokenizerConfig(kind=kind, vocab_size=330)
  tokenizer = tokenizers.build(config, ["We the people of the land. " * 50])
  samples = _simulate(tokenizer)
  rows = _tokens(render_page(samples, tokenizer, SETTINGS))
  assert [len(row) for row in rows] == [90] * 3
  for b, row in enumerate(rows):
    for k in range(STEPS + 1):
      shown = [_now(token["changes"], k) for token in row]
      assert shown == _expected(samples, tokenizer, b, k)
    for l, token in enumerate(row):
      classes = token["class"].split()
      assert ("given" in classes) == (l < 3)
      drawn = samples.step[b, l] >= 0
      assert ("data-step" in token) == drawn
      if drawn:
        assert int(token["data-step"]) == samples.step[b, l] + 1
        for name, digits in (("confidence", 4), ("entropy", 3)):
          value = getattr(samples, name)[b, l]
          assert float(token[f"data-{name}"]) == pytest.approx(
            value, abs=10**-digits
          )
      ids = samples.path[:, b, l]
      fresh = [c[0] for c in token["changes"] if len(c) == 3]
      pad = tokenizer.vocab.pad
      assert fresh == [
        k for k in range(1, STEPS + 1) if ids[k] != ids[k - 1] and ids[k] < pad
      ]


def test_numbers_and_settings_are_printed(samples):
  told = visible_text(render_page(samples, BYTES, SETTINGS))
  for name, value in SETTINGS.items():
    assert f"{name} {value}" in told
  for b in range(3):
    assert (
      f"Text {b + 1} denoiser calls 12 remasked {samples.put_back[b]} " in told
    )
  for name, found in order_statistics(samples, V).items():
    assert f" {found.mean:.2f} {found.random_mean:.2f}" in told
    assert f"{name.replace('_', ' ')} {found.rows[1]:.2f}" in told
  assert "How 3 texts were sampled" in told and "12 steps" in told


def test_of_many_texts_the_first_are_shown():
  many = _simulate(BYTES, [f"text {i}" for i in range(20)], length=12)
  page = render_page(many, BYTES, {})
  assert len(_tokens(page)) == 16 and "How 16 of 20 texts were sampled" in page
  one = _simulate(BYTES, ["abcd"], length=12)
  assert "How 1 text was sampled" in render_page(one, BYTES, {})


def test_any_text_stays_text(samples):
  page = render_page(samples, BYTES, SETTINGS | {NASTY: NASTY})
  parsed = Page(page)
  scripts = [tag for tag, _ in parsed.tags if tag == "script"]
  assert len(scripts) == 1
  assert not any("onclick" in values for _, values in parsed.tags)
  plain = Page(render_page(_simulate(BYTES, ["abcd"]), BYTES, {"a": 1}))
  assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in plain.tags}
  assert NASTY in parsed.texts["texts"]
  assert parsed.texts["settings"].count(NASTY) == 2
  # Control characters, which could end or hide text, are symbols.
  assert not set(page) & set("\0\x1b\r\x9b")
  assert "\u2400\u241b[31m\u240d\ufffd ok" in parsed.texts["texts"]
  page.encode()


def test_the_page_needs_nothing_and_is_small(samples):
  page = render_page(samples, BYTES, SETTINGS)
  assert page == render_page(samples, BYTES, SETTINGS)
  assert "default-src 'none'" in page
  for _, values in Page(page).tags:
    for name in ("src", "href", "action", "data", "srcset"):
      assert values.get(name, "data:").startswith("data:")
  assert "@import" not in page and "url(" not in page
  long = "word " * 25
  many = _simulate(BYTES, [long] * 4, length=128, steps=20)
  assert len(render_page(many, BYTES, SETTINGS).encode()) < 150_000


def test_no_token_at_all(samples):
  empty = _revealed([-1, -1])
  assert len(_tokens(render_page(empty, BYTES, {}))) == 1
  arrays = {name: getattr(samples, name)[:0] for name in samples_lib.ARRAYS}
  none = Samples(texts=[], **arrays | {"path": samples.path[:, :0]})
  assert _tokens(render_page(none, BYTES, {})) == []


# MARK: in a browser

browser = browser_harness.browser


@pytest.fixture
def page(browser, samples, tmp_path):
  """The page, open in the browser."""
  path = tmp_path / "samples.html"
  path.write_text(render_page(samples, BYTES, SETTINGS), "utf-8")
  browser.open(path)
  return browser


SHOWN = """(() => {
  const all = [...document.querySelectorAll(".sample")];
  const text = all.findIndex((e) => e.getBoundingClientRect().height > 0);
  const tokens = [...all[text].querySelectorAll(".token")];
  const has = (name) => tokens.map((t) => t.classList.contains(name));
  const masked = has("masked");
  return {
    text, masked, fresh: has("new"), back: has("back"),
    count: all.filter((e) => e.getBoundingClientRect().height > 0).length,
    unseen: tokens.map((t) => getComputedStyle(t).color === "rgba(0, 0, 0, 0)"),
    silent: tokens.map((t) => t.getAttribute("aria-hidden") === "true"),
    gone: tokens.map((t) => getComputedStyle(t).display === "none"),
    told: tokens.map((t) => t.textContent),
    step: Number(document.querySelector("input[type=range]").value),
    output: document.querySelector("output").textContent,
    spoken: document.querySelector("input[type=range]")
      .getAttribute("aria-valuetext"),
    button: document.querySelector("button").textContent,
    about: document.querySelector(".about").textContent,
  };
})()"""
MOVE = """(() => {
  const slider = document.querySelector("input[type=range]");
  slider.value = STEP;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
})()"""
CHOOSE = """(() => {
  const select = document.querySelector("select");
  select.selectedIndex = TEXT;
  select.dispatchEvent(new Event("change", {bubbles: true}));
})()"""


def _move(page, step):
  page.run(MOVE.replace("STEP", str(step)))


def _choose(page, text):
  page.run(CHOOSE.replace("TEXT", str(text)))


def _check(shown, samples, text, step):
  assert shown["text"] == text and shown["count"] == 1
  assert shown["step"] == step
  now, ids = _expected(samples, BYTES, text, step), samples.path[:, text]
  before = _expected(samples, BYTES, text, max(step - 1, 0))
  back = [
    n is None and isinstance(b, str) for n, b in zip(now, before, strict=True)
  ]
  masked = [n is None and not b for n, b in zip(now, back, strict=True)]
  assert shown["back"] == back
  assert shown["masked"] == shown["unseen"] == shown["silent"] == masked
  assert shown["gone"] == [n is False for n in now]
  seen = [b if put else n for n, b, put in zip(now, before, back, strict=True)]
  for told, text_now in zip(shown["told"], seen, strict=True):
    assert told == (text_now or "") or text_now is None
  fresh = (ids[step] != ids[max(step - 1, 0)]) & (ids[step] < V.pad)
  assert shown["fresh"] == fresh.tolist()
  known = sum(isinstance(n, str) for n in now)
  total = sum(n is not False for n in now)
  told = f"step {step} of {STEPS}: {known} of {total} tokens"
  told += f", {sum(fresh)} new" if any(fresh) else ""
  told += f", {sum(back)} remasked" if any(back) else ""
  assert shown["output"] == shown["spoken"] == told


def test_the_page_loads_in_silence(page):
  page.run("new Promise((done) => setTimeout(done, 100))")
  names = [event["method"] for event in page.events]
  for name in ("Log.entryAdded", "Runtime.exceptionThrown"):
    assert name not in names, page.events
  assert page.run("typeof window.owned") == "undefined"
  assert page.run("document.scripts.length") == 1


def test_every_step_of_every_text_is_shown_exactly(page, samples):
  assert samples.put_back.min() > 0
  for text in (0, 2, 1):
    _choose(page, text)
    for step in (0, 12, *range(1, 12), 3, 0):
      _move(page, step)
      _check(page.run(SHOWN), samples, text, step)
    _choose(page, 0)
    _check(page.run(SHOWN), samples, 0, 0)


def test_keys_move_the_step(page, samples):
  _move(page, 6)
  page.run("document.activeElement.blur()")
  page.press("ArrowRight")
  _check(page.run(SHOWN), samples, 0, 7)
  page.run("document.querySelector('input[type=range]').focus()")
  for key, step in (
    ("Home", 0),
    ("ArrowLeft", 0),
    ("ArrowRight", 1),
    ("End", 12),
  ):
    page.press(key)
    _check(page.run(SHOWN), samples, 0, step)


def test_play_goes_to_the_end_and_pause_stops(page, samples):
  _move(page, 9)
  page.run("document.querySelector('button').focus()")
  page.press(" ", text=" ")
  assert page.run(SHOWN)["button"] == "Pause"
  deadline = time.monotonic() + 10
  while (shown := page.run(SHOWN))["button"] == "Pause":
    _check(shown, samples, 0, shown["step"])
    assert time.monotonic() < deadline
    time.sleep(0.05)
  _check(shown, samples, 0, 12)
  page.run("document.querySelector('button').click()")  # begins again
  page.run("document.querySelector('button').click()")
  page.run("new Promise((done) => setTimeout(done, 600))")
  _check(page.run(SHOWN), samples, 0, 0)


def test_a_token_tells_how_it_was_drawn(page, samples):
  _move(page, 12)
  spot = """(() => {
    const token = document.querySelectorAll(".token")[PLACE];
    token.scrollIntoView({behavior: "instant", block: "center"});
    const box = token.getClientRects()[0];
    return [box.left + box.width / 2, box.top + box.height / 2];
  })()"""
  place = 4  # put back once, see _simulate
  x, y = page.run(spot.replace("PLACE", str(place)))
  page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
  told = page.run(SHOWN)["about"]
  step = samples.step[0, place]
  assert told.startswith(f"Token {place + 1}: step 1 drew ")
  assert f"step {step} remasked it; step {step + 1} drew \u201c" in told
  confidence, entropy = samples.confidence[0, place], samples.entropy[0, place]
  assert f"confidence {confidence:.4f}, entropy {entropy:.3f} nats." in told
  # By keyboard: one stop for the text, then the arrows.
  page.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
  page.press("ArrowLeft")
  assert page.run(SHOWN)["about"].startswith(f"Token {place}: ")
  for _ in range(5):
    page.press("ArrowLeft")
  assert page.run(SHOWN)["about"] == "Token 1: \u201c<\u201d was given."
  stops = page.run("document.querySelectorAll('.token[tabindex=\"0\"]').length")
  assert stops == 1 and page.run(SHOWN)["step"] == 12
  # Masked ones are passed over.
  _move(page, 0)
  page.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
  for _ in range(5):
    page.press("ArrowRight")
  assert page.run(SHOWN)["about"] == "Token 3: \u201cs\u201d was given."


TINTS = """(() => {
  const parts = (e, name) => {
    const value = getComputedStyle(e)[name];
    const n = value.match(/[\\d.]+(e-\\d+)?/g).map(Number);
    const scale = value.startsWith("color(") ? 255 : 1;
    return [...n.slice(0, 3).map((v) => v * scale), n.length > 3 ? n[3] : 1];
  };
  const canvas = document.querySelector(".canvas");
  return {
    ground: parts(canvas, "backgroundColor"),
    tokens: [...canvas.children].map((e) =>
      [parts(e, "backgroundColor"), parts(e, "color")]),
    body: parts(document.body, "backgroundColor"),
    soft: ["header p", "small", "output", ".inline dt", ".key"].map((n) =>
      parts(document.querySelector(n), "color")),
  };
})()"""


def _contrast(a, b):
  light = lambda c: sum(
    w * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
    for w, x in zip((0.2126, 0.7152, 0.0722), (v / 255 for v in c), strict=True)
  )
  low, high = sorted((light(a), light(b)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("colour", ["confidence", "step"])
def test_tints_tell_tokens_apart_and_text_stands_out(
  page, samples, scheme, colour
):
  feature = {"name": "prefers-color-scheme", "value": scheme}
  page.call("Emulation.setEmulatedMedia", features=[feature])
  page.run(f"document.querySelector('[value={colour}]').click()")
  _move(page, 12)
  found = page.run(TINTS)
  ground = found["ground"][:3]
  over = lambda c: [
    c[3] * x + (1 - c[3]) * g for x, g in zip(c, ground, strict=False)
  ]
  drawn = np.flatnonzero((samples.step[0] >= 0) & (samples.step[0] < STEPS - 1))
  for place, (tint, ink) in enumerate(found["tokens"]):
    assert _contrast(over(tint), ink[:3]) > 4.5
    if samples.step[0, place] < 0:
      assert tint[3] == 0  # given, or nothing
  _move(page, 9)
  for tint, ink in page.run(TINTS)["tokens"]:
    assert ink[3] == 0 or _contrast(over(tint), ink[:3]) > 4.5
  back = "[...document.querySelectorAll('.back')]"
  style = "getComputedStyle(e)"
  struck = page.run(f"{back}.map((e) => {style}.textDecorationLine)")
  assert set(struck) == {"line-through"}
  grounds = page.run(f"{back}.map((e) => {style}.boxShadow)")
  assert "none" not in grounds
  page.call("Emulation.setEmulatedMedia", features=[])
  strength = np.array([found["tokens"][i][0][3] for i in drawn])
  value = -samples.confidence if colour == "confidence" else samples.step
  order = np.argsort(value[0, drawn], kind="stable")
  assert np.all(np.diff(strength[order]) >= -1e-3) and np.ptp(strength) > 0.25
  for soft in found["soft"]:
    assert _contrast(found["body"][:3], soft[:3]) > 4.5


def test_a_token_that_did_not_stay_has_no_tint(page, samples):
  """Its confidence is not known: that of the later one would be wrong."""
  _move(page, 5)
  tints = [tint[3] for tint, _ in page.run(TINTS)["tokens"]]
  shown = page.run(SHOWN)
  other = [
    place
    for place in range(samples.step.shape[1])
    if not any(shown[n][place] for n in ("masked", "back", "fresh"))
  ]
  early = [place for place in other if samples.step[0, place] + 1 > 5]
  stays = [place for place in other if 0 <= samples.step[0, place] < 5]
  assert len(early) > 3 and {tints[place] for place in early} == {0}
  assert len(stays) > 3 and min(tints[place] for place in stays) > 0


def test_without_scripts_every_text_is_there(browser, samples, tmp_path):
  path = tmp_path / "samples.html"
  path.write_text(render_page(samples, BYTES, SETTINGS), "utf-8")
  browser.call("Emulation.setScriptExecutionDisabled", value=True)
  try:
    browser.open(path)
    told = browser.run(
      "[...document.querySelectorAll('.canvas')].map((e) => e.innerText)"
    )
    for found, text in zip(told, TEXTS, strict=True):
      assert trace.visible(text).strip() in found
    heights = browser.run(
      "[...document.querySelectorAll('.controls')].map("
      "(e) => e.getBoundingClientRect().height)"
    )
    assert heights == [0, 0]
  finally:
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_every_text_is_whole(page, samples):
  page.run("""(() => {
    window.printed = [];
    addEventListener("beforeprint", () => {
      window.printed = [...document.querySelectorAll(".canvas")].map((e) =>
        [e.textContent, e.querySelectorAll(".masked, .back").length]);
    });
  })()""")
  _choose(page, 1)
  _move(page, 4)
  page.call("Page.printToPDF")
  end = "\u27e8end\u27e9"
  assert page.run("window.printed") == [
    [trace.visible(t) + end, 0] for t in TEXTS
  ]
  _check(page.run(SHOWN), samples, 1, 4)


def test_a_phone_scrolls_one_way_only(page):
  size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
  page.call("Emulation.setDeviceMetricsOverride", **size)
  width = page.run("document.documentElement.scrollWidth")
  page.call("Emulation.clearDeviceMetricsOverride")
  assert width <= 390
