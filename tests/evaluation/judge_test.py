"""Judges: a slow Kneser-Ney, sums to one, and a tiny Hugging Face model."""

import collections
import json
import math
import sys

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.data import corpora, splits
from mdm_jax.evaluation import huggingface_judge
from mdm_jax.evaluation import judge as judges
from mdm_jax.evaluation.judge import (
  HuggingFaceJudge,
  NgramJudge,
  make_judge,
  nll_per_byte,
)

DOCS = [d.text for d in corpora.load("python_docs")]
TOY = ["abracadabra", "a cab", "", "b", "abra", "bar na\u00efve", "\0\0a\0"]
PROSE = [text[:700] for text in DOCS[:3]]
ORDERS = range(1, 9)


# MARK: Kneser-Ney


class Slow:
  """Interpolated modified Kneser-Ney on dicts, one byte at a time."""

  def __init__(self, texts, order):
    self.order, self.counts = order, {}
    for n in range(1, order + 1):
      before = collections.defaultdict(list)
      for text in texts:
        for i in range(len(text) - n + 1):
          before[text[i : i + n]].append(text[i - 1] if i else None)
      if before:
        size = len if n == order else lambda found: len(set(found))
        self.counts[n] = {gram: size(found) for gram, found in before.items()}

  def discount(self, n, count):
    c = [sum(v == k for v in self.counts[n].values()) for k in range(5)]
    if not all(c[1:]):
      return [0, 0.5, 1, 1.5][min(count, 3)]
    y = c[1] / (c[1] + 2 * c[2])
    found = [0, *(k - (k + 1) * y * c[k + 1] / c[k] for k in (1, 2, 3))]
    return (found if min(found[1:]) > 0 else [0, 0.5, 1, 1.5])[min(count, 3)]

  def __call__(self, context, byte):
    context = context[max(len(context) - self.order + 1, 0) :]
    shorter = self(context[1:], byte) if context else 1 / 256
    n = len(context) + 1
    after = {
      g: c for g, c in self.counts.get(n, {}).items() if g[:-1] == context
    }
    if not after:
      return shorter
    taken = {g: self.discount(n, c) for g, c in after.items()}
    gram = context + bytes([byte])
    own = after.get(gram, 0) - taken.get(gram, 0)
    return (own + sum(taken.values()) * shorter) / sum(after.values())


@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_are_as_defined_on_a_toy_text(order):
  raw = [text.encode() for text in TOY]
  slow, fast = Slow(raw, order), NgramJudge(TOY, order)
  for text in [*raw, b"abrabra", b"zz", b"cab\xff\0abracad", b"a\0\0"]:
    expected = [slow(text[:i], text[i]) for i in range(len(text))]
    np.testing.assert_allclose(fast.probabilities(text), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 4, 8])
def test_probabilities_are_as_defined_on_prose(order):
  slow = Slow([text.encode() for text in PROSE], order)
  text = DOCS[5][:40].encode()
  expected = [slow(text[:i], text[i]) for i in range(len(text))]
  found = NgramJudge(PROSE, order).probabilities(text)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_discounts_by_hand():
  counts = np.repeat([1, 2, 3, 4, 9], [10, 5, 3, 2, 7])
  # The base is 10 / (10 + 2 * 5).
  expected = 1 - 2 * 0.5 * 5 / 10, 2 - 3 * 0.5 * 3 / 5, 3 - 4 * 0.5 * 2 / 3
  np.testing.assert_allclose(judges._discounts(counts), expected)


@pytest.mark.parametrize(
  "times", [[10, 5, 3, 0], [0, 5, 3, 2], [10, 0, 3, 2], [10, 5, 3, 30], [0] * 4]
)
def test_discounts_where_the_counts_give_none(times):
  counts = np.repeat([1, 2, 3, 4], times)
  assert judges._discounts(counts) == (0.5, 1.0, 1.5)


def _distribution(judge, context):
  return [judge.probabilities(context + bytes([b]))[-1] for b in range(256)]


@pytest.mark.parametrize("order", [1, 3, 8])
@pytest.mark.parametrize(
  "context",
  [b"", b"t", b"the stat", b"\xff\xfe", b"the \xff", b"\xffthe", b"\0"],
)
def test_the_next_byte_has_probability_one(order, context):
  found = _distribution(NgramJudge(PROSE, order), context)
  assert min(found) > 0
  np.testing.assert_allclose(sum(found), 1, rtol=1e-12)


@given(st.lists(st.binary(max_size=12), max_size=4), st.binary(max_size=9))
@settings(deadline=None, max_examples=10)
def test_the_next_byte_has_probability_one_whatever_the_text(texts, context):
  texts = [text.decode("latin-1") for text in texts]
  found = _distribution(NgramJudge(texts, 4), context)
  np.testing.assert_allclose(sum(found), 1, rtol=1e-12)


@given(st.text(max_size=50), st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_later_bytes_change_nothing(text, cut):
  judge, data = NgramJudge(PROSE), text.encode()
  np.testing.assert_array_equal(
    judge.probabilities(data)[:cut], judge.probabilities(data[:cut])
  )


@pytest.fixture(scope="module")
def trained():
  return NgramJudge(DOCS)


@given(st.text())
@settings(deadline=None)
def test_any_text_has_a_finite_likelihood(trained, text):
  nats = trained.nats(text)
  assert math.isfinite(nats) and (nats > 0 if text else nats == 0)
  per_byte = -np.log(trained.probabilities(text.encode()))
  np.testing.assert_allclose(nats, per_byte.sum())


def test_the_training_text_is_likelier_than_its_letters_or_words(trained):
  random = np.random.default_rng(0)
  text = DOCS[3][:2000]
  words, letters = text.split(" "), list(text)
  random.shuffle(words)
  random.shuffle(letters)
  by_words = trained.nats(" ".join(words))
  assert 2 * trained.nats(text) < by_words
  assert 2 * by_words < trained.nats("".join(letters))


def test_longer_contexts_judge_held_out_text_better():
  documents = corpora.load("python_docs")
  train = [d for d in documents if splits.place(d.text) >= 0.05]
  held_out = [d for d in documents if splits.place(d.text) < 0.05]
  bits = [
    nll_per_byte(
      NgramJudge([d.text for d in train], order), [d.text for d in held_out]
    ).value
    / math.log(2)
    for order in (2, 4, 6, 8)
  ]
  assert bits == sorted(bits, reverse=True)
  assert bits[-1] < 1.3  # 1.12 on Python 3.11's pages, 1.25 on 3.13's


def test_no_gram_crosses_two_texts():
  together, apart = NgramJudge(["abcd"], 2), NgramJudge(["ab", "cd"], 2)
  after = lambda judge: judge.probabilities(b"bc")[1]
  assert after(apart) < after(together)
  # Nothing comes after b: the shorter context alone decides.
  assert after(apart) == NgramJudge(["ab", "cd"], 1).probabilities(b"c")[0]


@pytest.mark.parametrize("texts", [[], [""]])
def test_without_a_text_every_byte_is_as_likely(texts):
  assert NgramJudge(texts).nats("any") == pytest.approx(3 * math.log(256))


@pytest.mark.parametrize("order", [0, 9])
def test_orders_end_at_eight_bytes(order):
  with pytest.raises(ValueError, match=f"order {order}"):
    NgramJudge(TOY, order)


def test_only_the_first_bytes_are_counted_and_it_says_so(monkeypatch):
  said = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: said.append(text % args)
  )
  monkeypatch.setattr(judges, "_MAX_BYTES", 9)
  cut = NgramJudge(["abcde", "fghij", "klm"])
  assert len(said) == 1 and "first 9 of 13 bytes" in said[0]
  whole = NgramJudge(["abcde", "fghi"])
  assert cut.nats("abcfghijklm") == whole.nats("abcfghijklm")
  assert len(said) == 1


# MARK: per byte


class Fixed:
  """A judge of known answers."""

  name = "fixed"

  def __init__(self, **nats):
    self.nats = nats.__getitem__


def test_nll_per_byte_by_hand():
  # 2 and 4 bytes; 8 nats in 6 bytes leave -2/3 and 2/3 of the texts' own.
  got = nll_per_byte(Fixed(**{"\u00e9": 2.0, "four": 6.0}), ["\u00e9", "four"])
  assert got.value == pytest.approx(8 / 6)
  assert got.stderr == pytest.approx(2 / 3 / 3)
  assert got.n == 2


def test_nll_per_byte_of_one_and_of_empty_texts():
  judge = Fixed(**{"": 0.0, "ab": 3.0})
  one = nll_per_byte(judge, ["ab"])
  assert one.value == 1.5 and math.isnan(one.stderr) and one.n == 1
  assert nll_per_byte(judge, ["ab", ""]).value == 1.5
  for texts in ([], ["", ""]):
    got = nll_per_byte(judge, texts)
    assert math.isnan(got.value) and math.isnan(got.stderr)
    assert got.n == len(texts)


# MARK: a judge from a folder, without its packages


def test_no_folder_means_the_ngram_judge():
  judge = make_judge("", TOY)
  assert isinstance(judge, NgramJudge) and "8" in judge.name
  assert judge.nats("abra") == NgramJudge(TOY, 8).nats("abra")


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_model_is_reported_in_one_line(tmp_path, kind):
  path = tmp_path / "model"
  if kind == "file":
    path.write_text("{}")
  elif kind == "empty":
    path.mkdir()
  with pytest.raises(UserError, match="has no config.json") as error:
    make_judge(str(path), TOY)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_reported_with_its_extra(
  tmp_path, monkeypatch, package
):
  (tmp_path / "config.json").write_text("{}")
  for name in ("torch", "transformers"):
    monkeypatch.setitem(sys.modules, name, None if name == package else math)
  with pytest.raises(UserError) as error:
    make_judge(str(tmp_path), TOY)
  assert repr(package) in str(error.value)
  assert str(error.value).endswith("pip install -e '.[hf]'")


@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_overlap_by_half(length, limit):
  seen = []
  for start, new, end in huggingface_judge._windows(length, limit):
    assert 0 <= start <= new < end <= length
    assert end - start <= limit
    assert start == 0 or new - start >= limit - max(limit // 2, 1)
    seen += range(new, end)
  assert seen == list(range(length))


# MARK: a judge from a folder

LIMIT = 16
SHORT = "the cat sat"
LONG = "the cat sat on the mat \u2603 and 12 dogs. " * 6


def _need_packages():
  """Returns torch and transformers, or skips."""
  reason = "needs: pip install -e '.[hf]'"
  names = "torch", "transformers"
  return [pytest.importorskip(name, reason=reason) for name in names]


def _tokenizer(**special):
  _, transformers = _need_packages()
  from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
  )

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<bos>", "<eos>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([LONG], trainer)
  # As many do; here what stands first is the judge's affair.
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, **special
  )


def _encode(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False)


def _save(folder, kind="GPT2LMHeadModel", tokenizer=None, **config):
  """Saves a random model and its tokenizer; returns both."""
  torch, transformers = _need_packages()
  tokenizer = tokenizer or _tokenizer(bos_token="<bos>", eos_token="<eos>")
  torch.manual_seed(0)
  kind = getattr(transformers, kind)
  config = {"initializer_range": 0.3, **config, "vocab_size": len(tokenizer)}
  model = kind(kind.config_class(**config)).eval()
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer


GPT2 = dict(n_positions=LIMIT, n_embd=16, n_layer=2, n_head=2)
NEOX = dict(
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
)


def _conditional(model, context, token):
  """Returns the nats of a token after a context, from the logits."""
  import torch

  with torch.no_grad():
    logits = model(torch.tensor([context])).logits[0, -1].double().numpy()
  return np.log(np.exp(logits).sum()) - logits[token]


def test_a_text_costs_what_the_model_says(tmp_path):
  model, tokenizer = _save(tmp_path, **GPT2)
  judge = make_judge(str(tmp_path), TOY)
  ids = [tokenizer.bos_token_id, *_encode(tokenizer, SHORT)]
  assert 2 < len(ids) <= LIMIT
  by_hand = [_conditional(model, ids[:i], ids[i]) for i in range(1, len(ids))]
  assert judge.nats(SHORT) == pytest.approx(sum(by_hand), rel=1e-5)
  assert judge.nats("") == 0
  assert judge.name == str(tmp_path)


def test_a_long_text_is_read_in_windows(tmp_path):
  model, tokenizer = _save(tmp_path, **GPT2)
  ids = [tokenizer.bos_token_id, *_encode(tokenizer, LONG)]
  assert len(ids) > 3 * LIMIT
  total = 0.0
  for i in range(1, len(ids)):
    # The first LIMIT tokens from the start, then LIMIT / 2 a window.
    block = max(-(-(i - LIMIT) // (LIMIT // 2)), 0)
    end = min(LIMIT + block * LIMIT // 2, len(ids) - 1)
    total += _conditional(model, ids[max(end - LIMIT, 0) : i], ids[i])
  got = make_judge(str(tmp_path), TOY).nats(LONG)
  assert got == pytest.approx(total, rel=1e-5)


def test_the_end_token_stands_in_for_the_beginning(tmp_path):
  model, tokenizer = _save(
    tmp_path, tokenizer=_tokenizer(eos_token="<eos>"), **GPT2
  )
  first, second = _encode(tokenizer, "the cat")
  by_hand = _conditional(model, [tokenizer.eos_token_id], first)
  by_hand += _conditional(model, [tokenizer.eos_token_id, first], second)
  got = make_judge(str(tmp_path), TOY).nats("the cat")
  assert got == pytest.approx(by_hand, rel=1e-5)


def test_without_either_the_first_token_costs_the_vocabulary(tmp_path):
  model, tokenizer = _save(tmp_path, tokenizer=_tokenizer(), **GPT2)
  first, second = _encode(tokenizer, "the cat")
  by_hand = math.log(len(tokenizer)) + _conditional(model, [first], second)
  judge = make_judge(str(tmp_path), TOY)
  assert judge.nats("the cat") == pytest.approx(by_hand, rel=1e-5)
  assert judge.nats("t") == pytest.approx(math.log(len(tokenizer)))


def test_a_model_without_a_limit_reads_a_text_at_once(tmp_path):
  model, tokenizer = _save(
    tmp_path, "BloomForCausalLM", hidden_size=16, n_layer=1, n_head=2
  )
  ids = [tokenizer.bos_token_id, *_encode(tokenizer, LONG)]
  by_hand = [_conditional(model, ids[:i], ids[i]) for i in range(1, len(ids))]
  got = make_judge(str(tmp_path), TOY).nats(LONG)
  assert got == pytest.approx(sum(by_hand), rel=1e-5)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
  _save(tmp_path, "BertLMHeadModel", **NEOX)
  with pytest.raises(UserError, match="is not causal"):
    HuggingFaceJudge(str(tmp_path))


def test_a_model_without_its_head_is_refused(tmp_path):
  _save(tmp_path, "GPTNeoXModel", **NEOX)
  with pytest.raises(UserError, match="lacks weights .* lm_head.weight"):
    HuggingFaceJudge(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  _save(tmp_path, **GPT2)
  for path in tmp_path.glob("*token*"):
    path.unlink()
  with pytest.raises(UserError, match="tokenizer") as error:
    HuggingFaceJudge(str(tmp_path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "config"])
def test_a_damaged_folder_is_reported_in_one_line(tmp_path, damage):
  _save(tmp_path, **GPT2)
  weights = tmp_path / "model.safetensors"
  if damage == "no weights":
    weights.unlink()
  elif damage == "cut weights":
    weights.write_bytes(weights.read_bytes()[:500])
  else:
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "unheard_of"
    (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="can't be loaded") as error:
    HuggingFaceJudge(str(tmp_path))
  assert "\n" not in str(error.value)
