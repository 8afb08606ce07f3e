#!/usr/bin/env bash
# What setup.sh and run.sh ask of one host of the TPU; it runs there.
#
#   worker.sh install
#   worker.sh train ARGS...
#
# GRACE_SECONDS  that a program still running has to save and end (600)
# UV, PYTHON     the installer and the interpreter that are used
set -euo pipefail

source=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$HOME/venv/bin/python}
pid_file=$HOME/mdm_jax.pid

# The system's Python is too old on some TPU images; uv brings another one.
install() {
  local uv=${UV:-$HOME/.local/bin/uv}
  [[ -x $uv ]] || python3 -m pip install --quiet --user uv
  "$uv" venv --quiet --clear --python=3.11 "$HOME/venv"
  "$uv" pip install --quiet --python="$HOME/venv/bin/python" \
    "${source}[tpu,gs]"
}

# Whether a process is a program that was started here: numbers are used again.
ours() {
  local args
  args=$(tr '\0' ' ' 2> /dev/null < "/proc/$1/cmdline") || return 1
  [[ $args == *"mdm_jax.main"* || $args == *"worker.sh train"* ]]
}

# gcloud runs the command once more where it lost the connection, and the first
# program goes on meanwhile: it has the chips and the workdir's lock.
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
  echo "$$" > "$pid_file" # the program's too: exec keeps it
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
