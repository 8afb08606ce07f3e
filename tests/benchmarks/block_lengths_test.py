"""What the benchmark of block lengths trains, counts and shows."""

import json

import jax
import pytest
from ml_collections import config_dict

from mdm_jax.benchmarks import block_lengths, block_report, block_speed
from mdm_jax.core import rng
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import Visibility
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding

TINY = block_lengths.PRESETS["tiny"]
L = 16


def plain(config: config_dict.ConfigDict):
  return json.loads(config.to_json_best_effort())


def test_runs_differ_in_their_objective_alone():
  names = block_lengths.names(TINY)
  assert names == (
    *("autoregressive", "masked"),
    *(f"block_{size}" for size in (1, 4, 16)),
  )
  configs = [plain(block_lengths.config_of(name, TINY)) for name in names]
  for config in configs:
    # How they draw is set where they are timed.
    for name in ("name", "objective", "sample"):
      config.pop(name)
  assert all(config == configs[0] for config in configs)


def loop(block, **fields):
  config = ModelConfig(num_layers=2, embed_dim=8, num_heads=2)
  denoiser = Denoiser(config, Vocabulary(8, forbidden=((5, 8),), mask=6, pad=7))
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  decoding = Decoding("blocks", Visibility("blocks", block), block=block)
  fields = {"num_steps": block} | fields
  return block_speed.Loop(denoiser, params, decoding, L, fields)


def test_flops_are_those_of_the_positions_that_are_read(mesh):
  four = loop(4)
  cached, whole = four.flops(calls=16.0)
  # A position's products in two layers, and its attention to 16 keys.
  mlp = 3 * 8 * four.denoiser.config.mlp_size
  one = 2 * (2 * (4 * 8 * 8 + mlp) + 4 * L * 8)
  head = 2 * L * 8 * four.denoiser.vocab.size
  # 16 calls of 4 positions, 4 of which read the block before as well.
  assert cached == (16 + 4) * 4 * one + head
  assert whole == 16 * L * one + head


def test_both_ways_to_draw_are_timed(mesh):
  loops = {"4": loop(4, num_steps=2), "row": loop(L, num_steps=2)}
  four, row = block_speed.measure(loops, repeats=1)
  # The rows have no end and no prompt.
  assert (four["calls"], row["calls"]) == (2 * L / 4, 2)
  assert four["calls_per_token"] == 0.5
  assert "cache" not in row and "times_faster" not in row
  factor = four["flops"]["whole_rows"] / four["flops"]["cache"]
  assert four["times_faster"]["arithmetic"] == factor > 2
  lines = block_speed.cells([four, row])
  assert {len(line) for line in lines} == {len(block_speed.COLUMNS)}
  assert lines[1][3] == lines[1][5] == ""


def test_a_finished_run_is_not_trained_again(tmp_path):
  found = {"run": {n: getattr(TINY, n) for n in block_lengths._OF_A_RUN}}
  (tmp_path / "masked").mkdir()
  path = tmp_path / "masked" / "block_lengths.json"
  path.write_text(json.dumps(found | {"cpu_seconds": 1.0}))
  assert block_lengths.trained("masked", TINY, tmp_path)["cpu_seconds"] == 1.0


def test_bounds_are_marked():
  bits = {"value": 2.0, "stderr": 0.1}
  run = {"bits_per_byte": bits, "is_bound": True, "cpu_seconds": 10.0}
  lines = block_report.cells(
    {"block_4": run, "block_1": run | {"is_bound": False}}
  )
  assert lines == [
    ["blocks of 4", "<= 2.000 ± 0.100", "10"],
    ["blocks of 1", "2.000 ± 0.100", "10"],
  ]


@pytest.mark.slow
def test_the_program_trains_measures_and_plots(tmp_path):
  pytest.importorskip("matplotlib")
  found = block_lengths.measure(TINY, tmp_path, repeats=1)
  runs, bits = found["runs"], lambda name: runs[name]["bits_per_byte"]["value"]
  assert list(runs) == list(block_lengths.names(TINY))
  # A block as long as the row is masked diffusion; a row that holds several
  # texts has several blocks.
  assert bits("block_16") == pytest.approx(bits("masked"), rel=0.02)
  assert not runs["block_1"]["is_bound"] and runs["block_4"]["is_bound"]
  names = [one["name"] for one in found["speed"]]
  assert "blocks of 4, threshold 0.5" in names
  assert all("cache" in one for one in found["long_rows"])
  assert b"</svg>" in block_report.as_svg(found)
  assert block_report.as_markdown(found).count("\n| --- |") == 3
  again = block_lengths.trained("masked", TINY, tmp_path)
  assert again == runs["masked"]
