"""What a plan says before training: warnings, parameters, durations."""

import math

import pytest

from mdm_jax import plan
from mdm_jax.config import Config
from mdm_jax.core.progress import console, duration
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import StageConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.config import MaskedStage
from mdm_jax.planning import scaling_laws


def uncovered_rates(config):
  return config.objective.warnings([s.objective for s in config.stages])


def stages(*rates, rehearsal=0.0):
  return Config(
    stages=tuple(
      StageConfig(objective=MaskedStage(mask_rate=r, rehearsal=rehearsal))
      for r in rates
    )
  )


def test_rates_that_no_stage_trains_are_named():
  config = stages((0.75, 0.9), (0.4, 0.6), (0.05, 0.2))
  (warning,) = uncovered_rates(config)
  assert "0.00-0.05, 0.20-0.40, 0.60-0.75, 0.90-1.00" in warning
  assert "rehearsal" in warning


PLAN = {
  **{"name": "a", "corpus": "b", "devices": "c", "stages": [], "seconds": 0.0},
  **dict.fromkeys(("params", "vocabulary", "rows_per_update"), 1),
  **{"held_out_rows": 1, "unique_tokens": 8, "tokens": 8},
  **{"notes": [], "warnings": []},
}


@pytest.mark.parametrize(
  "config",
  [
    stages(None),
    stages((0.05, 0.2), rehearsal=0.1),
    stages((0.0, 0.5), (0.4, 1.0)),
  ],
)
def test_full_coverage_is_no_warning(config):
  assert uncovered_rates(config) == []


def test_gradients_that_are_left_over_are_said():
  assert "3 steps" in plan._steps(4, 12) and "last 0" not in plan._steps(4, 12)
  assert "3 steps" in plan._steps(4, 14) and "last 2" in plan._steps(4, 14)


def test_parameters_are_counted(mesh, tiny_model):
  denoiser = Denoiser(tiny_model, Vocabulary.after_text(28))
  width, layers, hidden = 16, 2, 64
  attention = 4 * width * width + 2 * (width // 2)
  block = attention + 3 * width * hidden + 2 * width
  assert plan.num_params(denoiser) == 128 * width + layers * block + width


def test_the_table_of_parameters_has_names_shapes_and_shardings(
  any_mesh, tiny_model
):
  denoiser = Denoiser(tiny_model, Vocabulary.after_text(28))
  table = plan._parameters(denoiser)
  line = next(x for x in table.splitlines() if "mlp/gate" in x)
  cells = [cell.strip() for cell in line.strip("|").split("|")]
  shape, dtype, size, split = cells[1:]
  assert (shape, dtype) == ("(2, 16, 64)", "float32")
  assert size == f"{2 * 16 * 64:,}" and "fsdp" in split and "tensor" in split
  assert f"Total: {plan.num_params(denoiser):,}" in table


@pytest.mark.parametrize("width, split", [(120, True), (80, False)])
def test_a_narrow_terminal_shows_the_table_without_shardings(
  mesh, tiny_model, monkeypatch, width, split
):
  terminal = type(console)(force_terminal=True, width=width)
  monkeypatch.setattr(plan, "console", terminal)
  table = plan._parameters(Denoiser(tiny_model, Vocabulary.after_text(28)))
  assert max(map(len, table.splitlines())) <= width
  assert ("fsdp" in table) == split
  assert ("a wider terminal" in table) != split


@pytest.mark.parametrize(
  "seconds, text",
  [(0.0, "0:00"), (65.9, "1:05"), (3723.0, "1:02:03"), (-1.0, "0:00")],
)
def test_durations(seconds, text):
  assert duration(seconds) == text


@pytest.mark.parametrize(
  "params, tokens, epochs, reach",
  [(147_840, 1e5, 0.3, False), (85e6, 1e8, 100, True)],
)
def test_found_A16_a_law_that_expects_less_than_guessing_knows_says_so(
  params, tokens, epochs, reach, capsys
):
  laws = scaling_laws.forecast(params, tokens, epochs)
  worst = max(laws["diffusion_loss"], laws["ar_loss"])
  assert laws["losses_in_reach"] == reach == (worst < math.log(50_257))
  plan.show(PLAN | {"laws": laws})
  told = capsys.readouterr().out
  assert ("by fitted losses diffusion" in told) == reach
  assert (f"{laws['diffusion_loss']:.1f} nats for diffusion" in told) != reach
