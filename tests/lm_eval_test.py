"""The model of lm-evaluation-harness, without it and, slowly, with it.

It brings packages that nothing else needs (datasets, evaluate), so it is
installed in an environment of its own.
"""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apart_harness import python_with
from command_harness import check_mistake, environment
from mesh_harness import make_mesh

from mdm_jax import lm_eval
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.sample import Model
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.trained_model import TrainedModel
from mdm_jax.training.state import TrainState
from mdm_jax.workdir import Workdir

LENGTH = 32
CONFIG = Config(
  tokenizer=TokenizerConfig(kind="byte"),
  model=ModelConfig(num_layers=1, embed_dim=8, num_heads=2),
  stages=(StageConfig(length=LENGTH),),
  sample=SampleConfig(num_steps=4, temperature=0.7),
)
TOKENIZER = tokenizers.build(CONFIG.tokenizer, [])
QUESTIONS = [
  {"question": "Q: 1?\nA:", "choices": [" one", " two"], "answer": 0},
  {"question": "Q: 2?\nA:", "choices": [" 1", " " + "2" * 20], "answer": 1},
]
TASKS = {
  "tiny_choice": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
  "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
  "tiny_text": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: bypass}]
""",
}


@pytest.fixture(scope="module")
def trained():
  """A model with parameters as they were initialised, but larger."""
  mesh, denoiser = make_mesh("1x1"), Denoiser(CONFIG.model, TOKENIZER.vocab)
  with jax.set_mesh(mesh):
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    params = jax.tree.map(lambda p: p * 3, params)
  return TrainedModel(CONFIG, TOKENIZER, denoiser, mesh, params, 1)


@pytest.fixture(scope="module")
def model(trained):
  return Model(trained)


@pytest.fixture
def told(monkeypatch):
  """What is printed."""
  lines = []
  monkeypatch.setattr(
    lm_eval.console, "print", lambda text, **_: lines.append(text)
  )
  return lines


def requests(*args, doc=None, task="t"):
  ids = range(len(args)) if doc is None else doc
  return [
    types.SimpleNamespace(args=each, task_name=task, doc_id=i)
    for i, each in zip(ids, args, strict=True)
  ]


def test_all_answers_to_a_question_are_scored_in_one_way(model, told):
  long = "x" * 17
  given = ("Q", " a"), ("Q", long), ("P", " a"), ("P", " b"), ("P", "")
  harness = lm_eval.Harness(model, draws=8)
  asked = requests(*given, doc=[0, 0, 1, 1, 1])
  # Another task's question with the number of the first one.
  asked += requests(("P", " a"), doc=[0], task="u")
  found = harness.loglikelihood(asked)
  bounds = model.score([" a", long], "Q", draws=8).nats
  exact = model.score([" a", " b"], "P", "chain").nats
  expected = [*-bounds, *-exact, 0.0, -exact[0]]
  assert [value for value, _ in found] == expected
  assert not any(greedy for _, greedy in found)
  assert any("2 continuations by likelihood=nelbo, upper" in x for x in told)
  assert any("3 continuations by likelihood=chain, exact" in x for x in told)
  chosen = lm_eval.Harness(model, likelihood="chain:spread")
  (found,) = chosen.loglikelihood(requests(("Q", long)))
  assert found[0] == -model.score(long, "Q", "chain:spread").nats[0]


def test_contexts_are_cut_where_they_do_not_fit(model, told):
  harness = lm_eval.Harness(model)
  # The first byte that stays would be the second one of a character.
  context, text = "\u00e9" * 20 + "[MASK]", "abc"
  (found,) = harness.loglikelihood(requests((context, text)))
  kept = "\u00e9" * 11 + r"\[MASK]"
  assert found[0] == -model.score(text, kept, "chain").nats[0]
  assert any("1 of 1 contexts are cut" in line for line in told)
  with pytest.raises(UserError, match="40 tokens, and a row has 32"):
    harness.loglikelihood(requests(("Q", "x" * 40)))


def test_whole_texts_are_scored_in_rows(model, told):
  texts = "short", "", "a longer text, which is cut into several rows of 32"
  found = lm_eval.Harness(model).loglikelihood_rolling(
    requests(*[(text,) for text in texts])
  )
  nats = model.score([texts[0], texts[2]], draws=128).nats
  np.testing.assert_array_equal(found, [-nats[0], 0.0, -nats[1]])


def test_what_is_drawn_ends_at_a_stop_text(model, told, monkeypatch):
  harness = lm_eval.Harness(model, num_steps=2)
  wanted = {"max_gen_toks": 6, "until": ["b", "cd"], "num_beams": 2}
  args = ("ab" + "\\", wanted), ("x" * 50, wanted), ("[MASK]", wanted)
  real, seen = model.generate, []

  def drawing(prompts, **settings):
    seen.append((prompts, settings))
    drawn = real(prompts, **settings)
    own = "ab\\", "[MASK]", "x" * 26
    begin = [next(t for t in own if x.startswith(t)) for x in drawn.texts]
    return dataclasses.replace(drawn, texts=[f"{t}_acdb" for t in begin])

  monkeypatch.setattr(model, "generate", drawing)
  assert harness.generate_until(requests(*args)) == ["_a"] * 3
  (short, settings), (long, _) = seen
  assert short == ["ab" + "\\" * 2 + "[MASK:6]", r"\[MASK][MASK:6]"]
  assert settings == {"length": 16, "top_k": 1, "num_steps": 2}
  assert long == ["x" * 26 + "[MASK:6]"]
  assert any("have no effect: ['num_beams']" in line for line in told)
  monkeypatch.undo()
  sampled = {"do_sample": True, "temperature": 0.5, "max_gen_toks": 99}
  first, again = harness.generate_until(requests(("a", sampled), ("a", {})))
  assert len(first.encode()) <= 16 * 3 and first != again
  assert lm_eval._settings(sampled)["temperature"] == 0.5


def test_settings_are_checked_at_once(model):
  with pytest.raises(UserError, match="did you mean 'order'"):
    lm_eval.Harness(model, ordr="random")


def test_without_it_one_line_says_what_to_install(tmp_path):
  if lm_eval.modules.has("lm_eval"):
    pytest.skip("lm_eval is installed here")
  done = subprocess.run(
    [sys.executable, "-m", "mdm_jax.lm_eval", "--tasks", "x"],
    env=environment(tmp_path),
    capture_output=True,
    text=True,
  )
  check_mistake(done, "pip install -e '.[lm-eval]'")


@pytest.mark.slow
def test_the_harness_measures_a_run(trained, tmp_path):
  python = python_with(tmp_path, "lm-eval", "LM_EVAL_PYTHON")
  run = Workdir(tmp_path / "run")
  TOKENIZER.save(run.path)
  run.write_config(CONFIG, TOKENIZER.sha256)
  with jax.set_mesh(trained.mesh), Checkpoints(run.path) as checkpoints:
    params = trained.params
    checkpoints.save(1, TrainState(jnp.int32(1), params, params, ()), {})
  (tmp_path / "tasks").mkdir()
  data = tmp_path / "data.jsonl"
  data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
  for name, task in TASKS.items():
    head = f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "tasks" / f"{name}.yaml").write_text(head + task)
  done = subprocess.run(
    [
      *(python, "-m", "mdm_jax.lm_eval", "--model", "mdm_jax"),
      *("--model_args", f"workdir={run.path},draws=16"),
      *("--tasks", ",".join(TASKS), "--include_path", tmp_path / "tasks"),
      *("--output_path", tmp_path / "out", "--log_samples"),
    ],
    env=environment(tmp_path) | {"HF_HOME": str(tmp_path / "hf")},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  assert "2 continuations by likelihood=chain, exact" in done.stdout
  assert "2 continuations by likelihood=nelbo, upper" in done.stdout
  (found,) = (tmp_path / "out").rglob("results_*.json")
  results = json.loads(found.read_text())["results"]
  assert 0 <= results["tiny_choice"]["acc,none"] <= 1
  texts = [line["question"] for line in QUESTIONS]
  nats = Model(trained).score(texts, draws=16).nats.sum()
  bits = nats / np.log(2) / sum(map(len, texts))
  assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits)
