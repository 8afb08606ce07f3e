"""Small corpora that are prepared in blocks, here or by real processes."""

import collections
import hashlib
import json
import pydoc_data.topics

from mdm_jax import config as config_lib
from mdm_jax.data import corpora, passes, preparation
from mdm_jax.data import folder as folder_lib
from mdm_jax.data.splits import SIDES, Sides
from mdm_jax.data.stores import InMemory

TOPICS = [
  pydoc_data.topics.topics[name]
  for name in sorted(pydoc_data.topics.topics)
  if len(pydoc_data.topics.topics[name]) < 6000
][:24]
STAGES = [
  {"unit": "sentences", "length": 48, "min_words": 3, "easiest": 0.5},
  {"unit": "pairs", "length": 96},
  {"unit": "paragraphs", "length": 64},
]
BLOCK = 0.006  # megabytes: a few topics


def write_texts(folder):
  """Writes half of the texts as files, and half as lines of one file."""
  folder.mkdir(parents=True)
  for i, text in enumerate(TOPICS[::2]):
    (folder / f"a{i:02d}.txt").write_text(text, newline="")
  lines = [json.dumps({"text": text}) for text in TOPICS[1::2]]
  (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def make_config(texts, folder, **changes):
  """Returns three stages over some texts; fields as `tokenizer__kind`."""
  raw = {
    "data": {
      "corpus": f"text:{texts}/*",
      "prepared": str(folder),
      "block_megabytes": BLOCK,
      "eval_fraction": 0.25,
      "test_fraction": 0.25,
      "batch_size": 2,
    },
    "tokenizer": {"vocab_size": 400},
    "stages": [dict(stage) for stage in STAGES],
  }
  for name, value in changes.items():
    section, _, field = name.partition("__")
    target = raw["stages"][0] if section == "stage" else raw[section]
    target[field] = value
  return config_lib.from_dict(raw)


def run_here(name, job, blocks):
  """Does a pass in this process, the last block first."""
  for block in reversed(blocks):
    passes.run(name, job, block)


def sides(config):
  """Returns the documents of each side, of a corpus in memory."""
  store = InMemory(corpora.load_all(config.data))
  return divide(count(store, config.rows))


def count(store, rows_config):
  """Counts what a store has in memory."""
  job = passes.Job(rows_config, store)
  return preparation.count(job, store.blocks, preparation.run_here)


def divide(counted):
  """Returns the documents of each side, of what was counted in memory."""
  found = {b.side: passes.divide(counted.job, b) for b in counted.blocks}
  return Sides(**{s: found.get(s, found["train"])[s] for s in SIDES})


def fill(config, run=run_here):
  """Prepares the folder of a config; returns its manifest."""
  return folder_lib.prepare_folder(config.rows, None, run)


def contents(folder):
  """Returns the hash of each file in a folder and below."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def sequences(rows):
  """Counts the token sequences that some rows hold."""
  found = collections.Counter()
  for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
    for number in range(1, segments.max(initial=0) + 1):
      found[tuple(tokens[segments == number].tolist())] += 1
  return found
