"""Prepares a corpus with Apache Beam, on as many machines as its runner has.

  pip install -e '.[beam]'
  python -m mdm_jax.prepare_beam --config=FILE --config.data.prepared=FOLDER \\
    --runner=FlinkRunner --beam=--flink_master=HOST:8081

Every pass is a Beam pipeline over the blocks; the steps between passes run in
this process, as in --mode=prepare, and the files have the same bytes. All
machines must see the corpus and the folder under the same paths.
"""

from absl import flags

from mdm_jax import command_line, prepare
from mdm_jax.core import log_lines, modules
from mdm_jax.core.errors import Failure
from mdm_jax.core.progress import console
from mdm_jax.data import passes, preparation
from mdm_jax.data.blocks import Block
from mdm_jax.data.passes import Job, Pass


def beam_run(options: list[str]) -> preparation.Run:
  """Returns a function that runs a pass over blocks as a Beam pipeline.

  Args:
    options: pipeline options, written as Beam's own flags.

  Raises:
    UserError: Apache Beam is not installed.
  """
  modules.need("apache_beam", "beam", "mdm_jax.prepare_beam")
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions

  def run(name: Pass, job: Job, blocks: list[Block]) -> None:
    console.print(f"{name}: {len(blocks):,} blocks", soft_wrap=True)
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
      _ = (
        pipeline
        | beam.Create(blocks)
        | beam.Reshuffle()  # else a runner may fuse all blocks into one task
        | beam.Map(lambda block: passes.run(name, job, block))
      )

  return run


def main(_: list[str]) -> int:
  """Prepares the folder; returns the exit code."""
  try:
    config = command_line.read_config(None)
    options = [f"--runner={flags.FLAGS.runner}", *flags.FLAGS.beam]
    manifest = prepare.fill(config, None, beam_run(options))
  except Failure as error:
    return command_line.fail(error)
  prepare.print_summary(config, manifest)
  return 0


def _define_flags() -> None:
  # By the program alone: importing this module must add no flags.
  flags.DEFINE_string("runner", "DirectRunner", "Name of the Beam runner.")
  flags.DEFINE_multi_string(
    "beam", [], "A pipeline option of Beam, as --name=value."
  )


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse)
