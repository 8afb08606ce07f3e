"""--mode=prepare takes no more memory for four times the text."""

import sys

import pytest

from mdm_jax.benchmarks import prepare as benchmark

MEGABYTES = 1.5
WHOLE = 100.0  # megabytes of a block: all of the text is one
SMALL = 12 * 2**20  # bytes


def _peaks(folder, megabytes, block):
  """Returns the most memory of the program, and of its one worker."""
  texts = folder / f"texts_{megabytes}"
  if not texts.exists():
    texts.mkdir()
    benchmark.write_corpus(texts, megabytes * 1e6)
  (folder / "config.py").write_text(
    benchmark.CONFIG.format(stages=benchmark.STAGES["paragraphs"])
  )
  command = [sys.executable, "-m", "mdm_jax.main", "--mode=prepare"]
  command += [f"--config={folder / 'config.py'}", "--workers=1"]
  command += ["--config.tokenizer.kind=byte"]
  command += [f"--config.data.corpus=text:{texts}/*"]
  command += [f"--config.data.block_megabytes={block}"]
  command += [f"--config.data.prepared={folder / f'{megabytes}_{block}'}"]
  (parent, *others), _ = benchmark.peaks(command)
  return parent, max(others)


@pytest.mark.skipif(
  sys.platform != "linux", reason="only Linux tells the peak of a process"
)
@pytest.mark.slow
def test_four_times_the_text_needs_no_more_memory(tmp_path):
  """In one block it does, so the measure can tell."""
  parent, worker = _peaks(tmp_path, MEGABYTES, block=0.5)
  larger_parent, larger_worker = _peaks(tmp_path, 4 * MEGABYTES, block=0.5)
  _, one_block = _peaks(tmp_path, 4 * MEGABYTES, block=WHOLE)
  assert larger_worker <= worker + SMALL
  # The sample of the text: up to 32 MiB, it is all of it.
  assert larger_parent <= parent + 4 * 3 * MEGABYTES * 1e6 + SMALL
  assert one_block > worker + 2 * SMALL
