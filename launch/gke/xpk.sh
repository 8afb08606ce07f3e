#!/usr/bin/env bash
# Gives a run to a cluster that xpk made: https://github.com/AI-Hypercomputer/xpk
#
#   launch/gke/xpk.sh ARGS...
#
# ARGS are those of `python -m mdm_jax.main`. Which exit codes start it again is
# xpk's default: 42, and 127 to 255.
#
# PROJECT ZONE CLUSTER JOB_NAME TPU_TYPE IMAGE: launch/env.example
# DRY_RUN=1 prints the command only.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if ((!$#)); then
  echo "usage: $0 ARGS..., those of python -m mdm_jax.main" >&2
  exit 2
fi
need PROJECT ZONE CLUSTER JOB_NAME TPU_TYPE IMAGE

# xpk's own command takes the entrypoint's place, and sends SIGTERM to what it
# started, a shell: the program has to be that process.
printf -v quoted ' %q' "$@"
call xpk workload create --project="$PROJECT" --zone="$ZONE" \
  --cluster="$CLUSTER" --workload="$JOB_NAME" --tpu-type="$TPU_TYPE" \
  --num-slices=1 --docker-image="$IMAGE" --spot --max-restarts=100 \
  --termination-grace-period-seconds=600 \
  --command="exec python -m mdm_jax.main$quoted"
