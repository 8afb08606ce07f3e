#!/usr/bin/env bash
# Runs mdm_jax once on all hosts of the TPU, and prints their output.
#
#   launch/tpu_vm/run.sh ARGS...
#
# ARGS are those of `python -m mdm_jax.main`. The exit code is the first of the
# hosts' codes that is not 0. JAX detects the other hosts.
#
# PROJECT ZONE TPU_NAME: launch/env.example
# DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if ((!$#)); then
  echo "usage: $0 ARGS..., those of python -m mdm_jax.main" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME

# A shell on the TPU parses this again, so every argument is quoted.
printf -v quoted ' %q' "$@"
call gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" \
  --zone="$ZONE" --worker=all --quiet \
  --command="bash mdm_jax/launch/tpu_vm/worker.sh train$quoted" < /dev/null
