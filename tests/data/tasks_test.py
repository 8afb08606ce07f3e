"""Generated problems have answers that can be checked."""

import random

import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.data import answers, corpora, splits, tasks
from mdm_jax.data.config import DataConfig
from mdm_jax.data.splits import Shares


def problems(name, count=300):
  for document in corpora.load(f"task:{name}", count):
    prompt, answer, *behind = answers.parts(document.text)
    if behind:  # the answer is a hole in the prompt
      yield prompt + tasks.HOLE + behind[0], answer.removesuffix(answers.HOLE)
    else:
      yield prompt, answer.removesuffix(answers.END)


@pytest.mark.parametrize("name", [*tasks.TASKS])
def test_the_given_answer_is_right_and_a_changed_one_wrong(name):
  task, draw = tasks.TASKS[name], random.Random(0)
  for prompt, answer in problems(name):
    assert task.right(prompt, answer)
    at = draw.randrange(len(answer))
    other = "1" if answer[at] != "1" else "2"
    wrong = answer[:at] + other + answer[at + 1 :]
    for changed in (wrong, answer[:-1], answer + answer[-1], ""):
      assert changed == answer or not task.right(prompt, changed), changed


def test_a_sudoku_has_one_solution_and_all_grids_are_drawn():
  puzzles = [prompt[:-1] for prompt, _ in problems("sudoku")]
  assert all(len(tasks._solutions([*puzzle])) == 1 for puzzle in puzzles)
  assert len(tasks._grids()) == len(set(tasks._grids())) == 288
  assert {6 <= puzzle.count(".") <= 10 for puzzle in puzzles} == {True}


def test_problems_are_those_of_their_seed_and_differ():
  load = lambda name: [d.text for d in corpora.load(name, 50)]
  assert load("task:addition") == load("task:addition:0")
  assert load("task:addition") != load("task:addition:1")
  assert len(set(load("task:brackets"))) == 50


def test_no_problem_is_in_two_splits():
  documents = corpora.load("task:sorting", 2000)
  shares = Shares(0.1, 0.1, splits.HELD_OUT)
  split = splits.decide(splits.count(documents, shares), shares)
  sides = split(documents)
  prompts = {s: {answers.parts(d.text)[0] for d in sides[s]} for s in sides}
  assert all(len(prompts[s]) > 100 for s in splits.SIDES)
  assert sum(map(len, prompts.values())) == 2000


@pytest.mark.parametrize(
  "corpus, words",
  [
    ("task:sudok", "did you mean 'sudoku'?"),
    ("task:sudoku:x", "the seed is not a number"),
    ("task:sorting", "no 20,000 different"),
  ],
)
def test_what_is_no_task_is_said(corpus, words, monkeypatch):
  if corpus == "task:sorting":
    few = tasks.Task(lambda draw: ("1=", "1"), lambda *_: True)
    monkeypatch.setitem(tasks.TASKS._pieces, "sorting", few)
  with pytest.raises(UserError, match=words):
    corpora.load_and_count(corpus, DataConfig())
