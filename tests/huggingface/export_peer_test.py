"""transformers computes and draws from an exported folder what we do.

It runs in an environment of its own: see peer_test.py.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import pydoc_data.topics
import random
import subprocess

import huggingface_harness as harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_harness
import scripts_harness
from apart_harness import python_with
from export_harness import TINY, logits, model_of

from mdm_jax import imported_model
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.export import export_model
from mdm_jax.model.context import CAUSAL, FULL
from mdm_jax.model.rope_scaling import RopeScaling
from mdm_jax.objectives.config import AutoregressiveConfig
from mdm_jax.sample import Model
from mdm_jax.sampling import schedule
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

PEER = pathlib.Path(__file__).with_name("export_peer.py")
IDS = np.random.default_rng(0).integers(0, 256, (2, 12))
ROWS = 20_000


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """The interpreter of an environment with torch and transformers."""
  return python_with(tmp_path_factory.mktemp("peer"), "peer", "PEER_PYTHON")


def ask(python, folder, **asked):
  request, answer = folder / "request.json", folder / "answer.npz"
  request.write_text(json.dumps(asked))
  command = [python, PEER, folder, request, answer]
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  return np.load(answer, allow_pickle=False)


SIZES = {
  "qwen3": {"num_kv_heads": 2, "head_dim": 6},
  "qwen3 with biases": {"qkv_bias": True},
  "llama": {"qk_norm": False, "tie_embeddings": False},
  "qwen2": {"qk_norm": False, "qkv_bias": True, "norm_eps": 1e-5},
  "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=2.0)},
}
CAUSAL_TOO = AutoregressiveConfig(name="autoregressive")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
def test_logits_are_ours(python, tmp_path, mesh, name, causal):
  sizes = dataclasses.replace(TINY, **SIZES[name])
  fields = {"objective": CAUSAL_TOO} if causal else {}
  model = model_of(sizes, **fields)
  export_model(model, str(tmp_path / "out"), most=20_000)
  theirs = ask(python, tmp_path / "out", ids=IDS.tolist())["logits"]
  ours = logits(model, IDS, CAUSAL if causal else FULL)
  real = np.isfinite(ours)
  assert real.sum() == IDS.size * model.tokenizer.vocab.predictable
  assert np.abs(ours[real]).max() > 1
  np.testing.assert_allclose(theirs[real], ours[real], atol=1e-5)


@pytest.mark.slow
def test_a_runs_logits_are_ours(python, tmp_path, mesh):
  """Of the run in the folder RUN, if it is given, else of a small model."""
  run = os.environ.get("RUN")
  model = load_model(Workdir(run)) if run else model_of(TINY)
  export_model(model, str(tmp_path / "out"))
  ids = np.random.default_rng(0).integers(0, model.tokenizer.vocab.pad, (8, 64))
  ids[:, ::2] = model.tokenizer.vocab.mask
  theirs = ask(python, tmp_path / "out", ids=ids.tolist())["logits"]
  with jax.set_mesh(model.mesh):
    ours = logits(model, ids, FULL)
  real = np.isfinite(ours)
  difference = np.abs(theirs[real] - ours[real]).max()
  most = np.abs(ours[real]).max()
  print(f"logits up to {most:.3f}, largest difference {difference:.2e}")
  assert difference < 1e-5 * max(most, 1)


@pytest.mark.slow
def test_shifted_outputs_are_those_before(python, tmp_path, mesh):
  sizes = dataclasses.replace(TINY, qk_norm=False, shift_outputs=True)
  model = model_of(sizes)
  export_model(model, str(tmp_path / "out"))
  theirs = ask(python, tmp_path / "out", ids=IDS.tolist())["logits"]
  ours = logits(model, IDS, FULL)[:, 1:, :257]
  np.testing.assert_allclose(theirs[:, :-1, :257], ours, atol=1e-5)


# MARK: tokenizers

PAGES = 20
KINDS = "chinese", "hindi", "arabic", "thai", "english"


def real_texts():
  pages = [text for _, text in sorted(pydoc_data.topics.topics.items())][:PAGES]
  draw = random.Random(0)
  return pages + ["".join(getattr(scripts_harness, k)(draw, 30)) for k in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece"])
def test_its_tokenizer_gives_our_ids(python, tmp_path, mesh, kind):
  """Also for the names of special tokens, and with special ids in place."""
  texts = real_texts()
  config = TokenizerConfig(kind=kind, vocab_size=1500)
  tokenizer = tokenizers.build(config, texts[::2])
  model = model_of(TINY, tokenizer)
  export_model(model, str(tmp_path / "out"))
  asked = [*texts, "a<|mask|> <|end|>b", "\u2581 <0x41>"]
  theirs = ask(python, tmp_path / "out", texts=asked)
  for i, text in enumerate(asked):
    ids, wanted = theirs[f"text{i}"], tokenizer.encode(text)
    if kind == "sentencepiece" and i < PAGES:
      # Lines of one character have splits that are equally likely.
      assert (ids != wanted).mean() < 0.01
      ids, wanted = np.sort(ids), np.sort(wanted)
    np.testing.assert_array_equal(ids, wanted, str(i))


# MARK: the sampler


class Exact:
  """The probabilities of the texts that our sampler draws, by its rule."""

  def __init__(self, model, prompt, settings):
    self.model, self.settings = model, settings
    self.mask = model.tokenizer.vocab.mask
    self.length = len(prompt)
    self.pace = schedule.pace(settings, self.length).revealed
    self.free = tuple(i for i, t in enumerate(prompt) if t == self.mask)
    self.known = {}

  def __call__(self, x, step=0):
    """Returns the probability of each text that x, a tuple, may become."""
    left = [i for i, token in enumerate(x) if token == self.mask]
    if not left:
      return {x: 1.0}
    count = self.pace[step + 1][len(self.free)]
    count -= self.pace[step][len(self.free)]
    found = {}
    for chosen, share in self.places(x, left, count):
      choices = [self.tokens(x)[i] for i in chosen]
      for drawn in itertools.product(*(c.items() for c in choices)):
        after = list(x)
        weight = share
        for i, (token, p) in zip(chosen, drawn, strict=True):
          after[i] = token
          weight *= p
        for text, p in self(tuple(after), step + 1).items():
          found[text] = found.get(text, 0.0) + weight * p
    return found

  def places(self, x, left, count):
    if self.settings.order == "random":
      every = list(itertools.combinations(left, count))
      return [(chosen, 1 / len(every)) for chosen in every]
    # With a prompt there are no ties.
    scores = np.round(self.probabilities(x).max(-1) * 4096)
    first = sorted(left, key=lambda i: -scores[i])
    ties = scores[first[:-1]] == scores[first[1:]]
    assert not ties.any()
    return [(first[:count], 1.0)]

  def probabilities(self, x):
    if x not in self.known:
      found = logits(self.model, np.array([x]), FULL)[0].astype(np.float64)
      found -= found.max(-1, keepdims=True)
      self.known[x] = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    return self.known[x]

  def tokens(self, x):
    """The tokens of each position with their probabilities."""
    p = self.probabilities(x) ** (1 / self.settings.temperature)
    result = []
    for row in p:
      ids = np.argsort(-row, kind="stable")[: self.settings.top_k]
      kept = row[ids]
      before = np.cumsum(kept) - kept
      kept = np.where(before < self.settings.top_p * kept.sum(), kept, 0)
      pairs = zip(ids.tolist(), kept / kept.sum(), strict=True)
      result.append({i: q for i, q in pairs if q > 0})
    return result


SETTINGS = {
  "random": {"order": "random", "num_steps": 3, "temperature": 0.7},
  "random, two at once": {"order": "random", "num_steps": 2},
  "confidence": {"order": "confidence", "num_steps": 3, "temperature": 1.3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_its_sampler_has_our_samplers_distribution(
  python, tmp_path, mesh, name
):
  """Texts of three tokens before a given one; the same seed, the same texts."""
  plain = {"top_k": 3, "top_p": 0.9, "temperature": 1.0}
  settings = SampleConfig(
    length=5, temperature_range=None, **(plain | SETTINGS[name])
  )
  model = model_of(TINY, scale=0.3, sample=settings)
  export_model(model, str(tmp_path / "out"))
  mask = model.tokenizer.vocab.mask
  prompt = [104, mask, mask, mask, 33]
  exact = Exact(model, prompt, settings)(tuple(prompt))
  assert sum(exact.values()) == pytest.approx(1)
  assert 10 < len(exact) < 400
  asked = {"input_ids": [prompt], "num_return_sequences": ROWS, "seed": 1}
  theirs = ask(python, tmp_path / "out", draws=[asked, asked])
  np.testing.assert_array_equal(theirs["draw0"], theirs["draw1"])
  ours = Model(model).generate("h[MASK:3]!", num_samples=ROWS).path[-1]
  check(theirs["draw0"], exact)
  check(ours, exact)


def check(rows, exact):
  counts = dict.fromkeys(exact, 0)
  for row in map(tuple, np.asarray(rows).tolist()):
    counts[row] += 1
  want = np.array(list(exact.values()))
  got = np.array(list(counts.values()))
  # Rare texts together: the statistic needs some of each.
  rare = want * ROWS < 5
  pooled = lambda n: np.append(n[~rare], n[rare].sum())
  got, want = pooled(got), pooled(want)
  some = want > 0
  assert abs(sampling_harness.chi_square(got[some], want[some])) < 4


@pytest.mark.slow
def test_rows_end_where_an_end_is_drawn(python, tmp_path, mesh):
  model = model_of(TINY, sample=SampleConfig(length=12, num_steps=12))
  vocab = model.tokenizer.vocab
  table = np.asarray(model.params["embedding"]).copy()
  table[vocab.end] *= 3  # so that it is drawn now and then
  params = model.params | {"embedding": jnp.asarray(table)}
  model = dataclasses.replace(model, params=params)
  export_model(model, str(tmp_path / "out"))
  asked = {"num_return_sequences": 200, "seed": 0, "top_k": 0, "top_p": 1.0}
  drawn = ask(python, tmp_path / "out", draws=[asked | {"max_new_tokens": 8}])[
    "draw0"
  ]
  assert drawn.shape == (200, 8) and not (drawn == vocab.mask).any()
  ends = drawn == vocab.end
  behind = np.cumsum(ends, axis=1) - ends > 0
  assert 0 < ends.any(axis=1).sum() < 200
  np.testing.assert_array_equal(drawn == vocab.pad, behind)


@pytest.mark.slow
def test_a_causal_model_is_drawn_from_by_transformers_itself(
  python, tmp_path, mesh
):
  harness.save(tmp_path / "in", {})
  model = imported_model.load_imported(f"hf:{tmp_path / 'in'}")
  export_model(model, str(tmp_path / "out"))
  asked = {"input_ids": [[5, 7]], "max_length": 12, "num_return_sequences": 300}
  drawn = ask(python, tmp_path / "out", draws=[asked])["draw0"]
  assert drawn[:, 2:].max() <= 259  # ids of rows without a token: suppressed
  allowed = model.tokenizer.vocab.is_predictable(drawn)
  assert (allowed | (drawn == model.tokenizer.vocab.pad)).all()
