"""A run on prompts with answers, by the command line."""

import json
import signal

import faults_harness as harness
import pytest

pytestmark = pytest.mark.slow
ARGS = (
  *("--config.data.corpus=chat:talk", "--config.data.answer_length=6"),
  *("--config.stages[0].unit=conversations", "--config.eval.samples=4"),
  "--config.stages[1].unit=conversations",
  "--config.stages[0].updates=6",
  "--config.stages[1].updates=8",
  "--config.train.checkpoint_every=4",
)
UPDATES = 14


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  found = harness.make_place(folder, tmp_path_factory.mktemp("cache"))
  (folder / "talk").mkdir()
  lines = [
    json.dumps({"prompt": f"{a}+{b}=", "completion": f"{a + b}"})
    for a in range(10)
    for b in range(10)
  ]
  (folder / "talk" / "sums.jsonl").write_text("\n".join(lines))
  return found


@pytest.mark.parametrize("objective", ["masked", "autoregressive", "joint"])
def test_a_killed_fine_tuning_resumes_to_the_same_bits(place, objective):
  args = *ARGS, f"--config.objective.name={objective}"
  if objective != "masked":
    args += "--config.sample.num_steps=20", "--config.sample.order=spread"
    args += ("--config.stages[0].mask_rate=None",)
  whole = place.run(f"whole_{objective}", *args)
  assert whole.code == 0, whole.err
  patch = harness.SLOW_UPDATES.format(seconds=0.05)
  process = place.start(f"hurt_{objective}", *args, patch=patch)
  process.wait_for_checkpoint(8)
  assert process.kill().code == -signal.SIGKILL
  resumed = place.run(f"hurt_{objective}", *args)
  assert resumed.code == 0, resumed.err
  assert harness.state_hash(resumed.workdir, UPDATES) == harness.state_hash(
    whole.workdir, UPDATES
  )
  results = json.loads((whole.workdir / "results.json").read_text())
  again = json.loads((resumed.workdir / "results.json").read_text())
  assert results["measured"] == again["measured"]
  assert results["samples"] == again["samples"]
  assert "true: " in results["samples"][0]
  assert results["answers"]["exact"]["n"] == 4
  assert "of answers" in whole.said and "4 held-out prompts" in whole.said


def test_a_bad_line_ends_the_run_with_one_line(place):
  (place.folder / "bad.jsonl").write_text(
    '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2="}\n'
  )
  ended = place.run("bad", *ARGS, "--config.data.corpus=chat:bad.jsonl")
  assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
  for words in ("bad.jsonl, line 2: ", '"completion"', "on_bad_record=skip"):
    assert words in ended.err, words
