#!/usr/bin/env bash
# Deletes the TPU and its queued resource. The workdir is kept.
#
#   launch/tpu_vm/delete.sh
#
# PROJECT ZONE TPU_NAME: launch/env.example
# DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if (($#)); then
  echo "usage: $0, without arguments" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME

call gcloud compute tpus queued-resources delete "$TPU_NAME" \
  --project="$PROJECT" --zone="$ZONE" --force --quiet
