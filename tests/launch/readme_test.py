"""launch/README.md: its commands run, and its tables say what is so."""

import re
import shutil

import pytest
from launch_harness import LAUNCH, OUT_OF_MEMORY, Stage, restarts
from paths import ROOT

PAGE = (LAUNCH / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# What the commands leave to others, each with what it would do here.
OTHERS = {
  "docker": "sys.exit(argv[0] == 'build' and not os.path.exists(argv[2]))",
  "gcloud": "",
  "kubectl": "",
  "sbatch": "os.execvp('bash', ['bash', *argv])",
  "sky": "sys.exit(not os.path.exists(argv[2]))",
  "srun": "",
  "xpk": "",
  "python": "print(argv[0] == '-c' and 8476)",
}


COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  for name, body in OTHERS.items():
    stage.fake(name, body)
  shutil.copytree(LAUNCH, tmp_path / "launch")
  return stage


def test_the_commands_are_found():
  launchers = {"babysit.sh", "jobset.sh", "xpk.sh", "train.sbatch", "sky jobs"}
  assert len(COMMANDS) >= 15
  assert all(any(x in block for block in BLOCKS) for x in launchers)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, stage):
  if "set -a" in command:
    shutil.copy(
      stage.folder / "launch/env.example", stage.folder / "launch/env"
    )
  told = stage.run("bash", "-c", command, cwd=stage.folder, DRY_RUN="1")
  assert told.returncode == 0, told.stderr
  assert told.stdout or stage.calls() or "launch/env" in command


def test_what_is_filled_in_is_read(stage):
  [block] = [block for block in BLOCKS if "env.example" in block]
  fill = "sed -i s/^TPU_NAME=/TPU_NAME=filled/ launch/env"
  block = block.replace("\n", f"\n{fill}\n", 1)
  command = f"{block}\nprintenv TPU_NAME"
  given = ("env", "-u", "TPU_NAME")  # or it would be exported already
  told = stage.run(*given, "bash", "-ec", command, cwd=stage.folder)
  assert told.stdout == "filled\n"


def test_links_and_files_exist():
  for target in re.findall(r"\]\((\S+?)\)", PAGE):
    assert (LAUNCH / target).exists(), target
  for name in re.findall(r"`((?:\w+/)+[\w.*-]+\.\w+)`", PAGE):
    assert list(LAUNCH.glob(name)) or list(ROOT.glob(name)), name


def test_the_first_table_has_all_launchers():
  table, _, _ = PAGE.partition("## Setup")
  own = {path.parent.name for path in LAUNCH.rglob("*") if path.is_file()}
  for folder in own - {"launch", "docker"}:
    assert f"`{folder}/" in table, folder


# MARK: exit codes


def codes(cell):
  """Returns the numbers in a cell of the table."""
  found = set()
  for first, last in re.findall(
    r"\b(\d+)(?:-(\d+))?\b", cell.split(", and")[0]
  ):
    found.update(range(int(first), int(last or first) + 1))
  return found


def test_the_table_says_what_the_codes_mean():
  _, _, section = PAGE.partition("## Exit codes")
  section, _, _ = section.partition("## ")
  rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|", section, re.MULTILINE)
  assert len(rows) == 5
  for name, again, ends in rows:
    for code, expected in restarts().items():
      if (name, code) != ("sky/*.yaml", OUT_OF_MEMORY):
        assert (code in codes(again)) == expected, (name, code)
        assert (code in codes(ends)) != expected, (name, code)
