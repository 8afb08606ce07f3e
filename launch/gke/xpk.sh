#!/usr/bin/env bash
# Submits a run to a cluster created by xpk: https://github.com/AI-Hypercomputer/xpk
#
#   launch/gke/xpk.sh ARGS...
#
# ARGS are those of `python -m mdm_jax.main`. The exit codes after which it is
# restarted are xpk's default: 42, and 127 to 255.
#
# PROJECT ZONE CLUSTER JOB_NAME TPU_TYPE IMAGE: launch/env.example
# DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if ((!$#)); then
  echo "usage: $0 ARGS..., those of python -m mdm_jax.main" >&2
  exit 2
fi
need PROJECT ZONE CLUSTER JOB_NAME TPU_TYPE IMAGE

# xpk replaces the entrypoint by its own command, which sends SIGTERM to the
# process that it started, a shell: so the program must replace that shell.
printf -v quoted ' %q' "$@"
call xpk workload create --project="$PROJECT" --zone="$ZONE" \
  --cluster="$CLUSTER" --workload="$JOB_NAME" --tpu-type="$TPU_TYPE" \
  --num-slices=1 --docker-image="$IMAGE" --spot --max-restarts=100 \
  --termination-grace-period-seconds=600 \
  --command="exec python -m mdm_jax.main$quoted"
