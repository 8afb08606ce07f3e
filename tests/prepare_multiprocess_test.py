"""Two real processes share the reading of sharded rows, and what is wrong."""

import prepare_harness as harness
import pytest
from processes_harness import python, running

pytestmark = pytest.mark.slow

CHILD = """
import json, sys, processes_harness, prepare_harness as harness
own = processes_harness.join()
import jax
import numpy as np
from mdm_jax.core import distributed
from mdm_jax.config import MeshConfig
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import make_mesh
from mdm_jax.data import shards
from mdm_jax.data.batches import make_batch
from mdm_jax.data.prepared import prepare_on_all

texts, whole, damaged = FOLDERS
looked = []
check = shards.Index.damaged
shards.Index.damaged = lambda index, number, vocab: (
  looked.append(f"{index.name} {number}") or check(index, number, vocab)
)
data = prepare_on_all(harness.make_config(texts, whole).rows)
result = {"looked": list(looked)}
rows = data.stages[2]
ends = rows.tokens._ends  # a row of every shard, in pairs
batch = make_batch(rows, ends[:4] - 1, 1, make_mesh(MeshConfig()))
held = batch.tokens.addressable_shards[0].data
result["mapped"] = rows.tokens._map.cache_info().currsize
result["rows"] = np.asarray(held)[0].tolist()
try:
  prepare_on_all(harness.make_config(texts, damaged).rows)
except UserError as error:
  result["told"] = str(error)
print(json.dumps(result), flush=True)
distributed.agree("the end", True)
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory):
  """What each of two processes tells, and the folder of the rows."""
  folder = tmp_path_factory.mktemp("two")
  texts = harness.write_texts(folder / "texts")
  for name in ("whole", "damaged"):
    harness.fill(harness.make_config(texts, folder / name))
  path = folder / "damaged" / "stage_2.000003.tokens.npy"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  places = tuple(str(folder / n) for n in ("texts", "whole", "damaged"))
  script = CHILD.replace("FOLDERS", repr(places))
  with running(python(script, 2)) as pair:
    assert [child.wait() for child in pair] == [0, 0], pair[0].output
    yield [child.result for child in pair], folder / "whole"


def test_each_shard_is_read_by_one(children):
  (first, second), folder = children
  files = list(folder.glob("*.tokens.npy"))
  looked = first["looked"] + second["looked"]
  assert len(set(looked)) == len(looked) == len(files)
  assert abs(len(first["looked"]) - len(second["looked"])) <= 1


def test_a_batch_maps_the_shards_of_its_own_rows(children):
  """Four rows of four shards, two for each."""
  (first, second), _ = children
  assert first["mapped"] == second["mapped"] == 2
  assert len(first["rows"]) == 2 and first["rows"] != second["rows"]


def test_what_one_finds_is_reported_to_both(children):
  (first, second), _ = children
  for result in (first, second):
    assert "stage_2.000003.tokens.npy" in result["told"]
    assert "\n" not in result["told"]
