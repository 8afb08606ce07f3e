#!/usr/bin/env bash
# The part of setup.sh and run.sh that runs on each host of the TPU.
#
#   worker.sh install
#   worker.sh train ARGS...
#
# GRACE_SECONDS  seconds for a program that still runs to save and exit (600)
# UV, PYTHON     the installer and the interpreter
set -euo pipefail

source=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$HOME/venv/bin/python}
pid_file=$HOME/mdm_jax.pid

# The system's Python is too old on some TPU images; uv installs a newer one.
install() {
  local uv=${UV:-$HOME/.local/bin/uv}
  [[ -x $uv ]] || python3 -m pip install --quiet --user uv
  "$uv" venv --quiet --clear --python=3.11 "$HOME/venv"
  "$uv" pip install --quiet --python="$HOME/venv/bin/python" \
    "${source}[tpu,gs]"
}

# Whether a process is a program started by this script: pids are reused.
ours() {
  local args
  args=$(tr '\0' ' ' 2> /dev/null < "/proc/$1/cmdline") || return 1
  [[ $args == *"mdm_jax.main"* || $args == *"worker.sh train"* ]]
}

# gcloud repeats the command after a lost connection, while the first program
# still runs and holds the chips and the workdir's lock.
end_predecessor() {
  local pid seconds=${GRACE_SECONDS:-600}
  pid=$(cat "$pid_file" 2> /dev/null) || return 0
  ours "$pid" || return 0
  echo "process $pid still runs here: it gets SIGTERM and $seconds s to save"
  kill -TERM "$pid" 2> /dev/null || return 0
  for ((; seconds > 0; seconds--)); do
    ours "$pid" || return 0
    sleep 1
  done
  echo "process $pid did not end: SIGKILL"
  kill -KILL "$pid" 2> /dev/null || true
}

train() {
  end_predecessor
  echo "$$" > "$pid_file" # also the program's pid: exec keeps it
  cd "$source"
  exec "$python" -m mdm_jax.main "$@"
}

if [[ ${1:-} == install ]] && (($# == 1)); then
  install
elif [[ ${1:-} == train ]] && (($# > 1)); then
  train "${@:2}"
else
  echo "usage: $0 install | train ARGS..." >&2
  exit 2
fi
