#!/usr/bin/env bash
# Runs on a spot TPU until done: creates the TPU, runs, and repeats both after a
# preemption.
#
#   launch/tpu_vm/babysit.sh ARGS...
#
# ARGS are those of `python -m mdm_jax.main`. It exits with the program's exit
# code if that needs a person (docs/reliability.md: 0 to 5), and restarts after
# all others. It deletes the TPU only to create it again, so that you can look at
# it afterwards: launch/tpu_vm/delete.sh deletes it.
#
# PROJECT ZONE TPU_NAME TPU_TYPE TPU_RUNTIME: launch/env.example
# POLL_SECONDS  seconds between checks of a TPU that is not ready yet (30)
# MAX_ERRORS    give up after this many consecutive errors of gcloud (10)
# DRY_RUN=1     only prints the commands of a run without preemptions.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$here/../common.sh"

if ((!$#)); then
  echo "usage: $0 ARGS..., those of python -m mdm_jax.main" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME TPU_TYPE TPU_RUNTIME
where=(--project="$PROJECT" --zone="$ZONE")
errors=0
set_up=no
words=$(mktemp)
trap 'rm -f "$words"' EXIT

tell() {
  printf '%(%H:%M:%S)T %s: %s\n' -1 "$TPU_NAME" "$*"
}

pause() {
  sleep "${POLL_SECONDS:-30}"
}

# Prints the state of the queued resource, MISSING or UNKNOWN. Once the resource
# is active, prints the machine's own state if the machine is lost: the
# resource's state follows later.
state() {
  local told
  if ! told=$(gcloud compute tpus queued-resources describe "$TPU_NAME" \
    "${where[@]}" --format='value(state.state)' 2> "$words"); then
    if grep -q NOT_FOUND "$words"; then
      echo MISSING
    else
      cat "$words" >&2
      echo UNKNOWN
    fi
    return
  fi
  if [[ $told == ACTIVE ]]; then
    case $(gcloud compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" \
      --format='value(state)' 2> /dev/null) in
      PREEMPTED | TERMINATED) told=PREEMPTED ;;
    esac
  fi
  echo "$told"
}

# Runs a script of this folder; exits after too many consecutive failures.
try() {
  if "$here/$1.sh"; then
    errors=0
    return
  fi
  fail "$1.sh failed"
}

fail() {
  errors=$((errors + 1))
  tell "$1 ($errors in a row)"
  if ((errors >= ${MAX_ERRORS:-10})); then
    tell "gives up: gcloud's own words are above"
    exit 1
  fi
  pause
}

# Exits for the codes that need a person.
judge() {
  local why
  case $1 in
    0) why="done" ;;
    1)
      # Also gcloud's own, where the machine went away under it: that shows late.
      pause
      if [[ $(state) != ACTIVE ]]; then
        tell "exit code 1, and the machine is gone: starts again"
        return
      fi
      why="a bug, or an error of gcloud's; it is told above"
      ;;
    2) why="a mistake in the arguments, the config or the data" ;;
    3) why="numerics: see numerics_report/ in the workdir" ;;
    4) why="storage: the workdir can't be written or read" ;;
    5) why="crash loop: several starts saved nothing new" ;;
    *)
      tell "exit code $1: starts again"
      pause
      return
      ;;
  esac
  tell "exit code $1: $why; stops"
  exit "$1"
}

run() {
  local code=0
  errors=0
  tell "runs"
  "$here/run.sh" "$@" || code=$?
  judge "$code"
}

if dry; then
  "$here/create.sh"
  "$here/setup.sh"
  "$here/run.sh" "$@"
  exit
fi

last=
while :; do
  now=$(state)
  [[ $now == "$last" ]] || tell "$now"
  last=$now
  case $now in
    ACTIVE)
      if [[ $set_up == no ]]; then
        try setup
        # It may have gone away meanwhile: the state tells.
        if ((!errors)); then set_up=yes; fi
      else
        run "$@"
      fi
      ;;
    MISSING)
      set_up=no
      try create
      ;;
    PREEMPTED | SUSPENDED | FAILED)
      try delete
      pause
      ;;
    UNKNOWN) fail "gcloud did not tell a state" ;;
    *)
      errors=0
      pause
      ;;
  esac
done
