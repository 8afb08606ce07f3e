#!/usr/bin/env bash
# Runs mdm_jax on all hosts of the TPU, once, and prints what they print.
#
#   launch/tpu_vm/run.sh ARGS...
#
# ARGS are those of `python -m mdm_jax.main`. The exit code is that of the first
# host whose own is not 0. JAX finds the other hosts itself.
#
# PROJECT ZONE TPU_NAME: launch/env.example
# DRY_RUN=1 prints the command only.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if ((!$#)); then
  echo "usage: $0 ARGS..., those of python -m mdm_jax.main" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME

# Another shell reads this, on the TPU: every argument has to survive it.
printf -v quoted ' %q' "$@"
call gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" \
  --zone="$ZONE" --worker=all --quiet \
  --command="bash mdm_jax/launch/tpu_vm/worker.sh train$quoted" < /dev/null
