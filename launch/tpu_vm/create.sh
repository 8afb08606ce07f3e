#!/usr/bin/env bash
# Requests a spot TPU as a queued resource, and returns; it may take hours to
# become ready.
#
#   launch/tpu_vm/create.sh
#
# PROJECT ZONE TPU_NAME TPU_TYPE TPU_RUNTIME: launch/env.example
# DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if (($#)); then
  echo "usage: $0, without arguments" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME TPU_TYPE TPU_RUNTIME

call gcloud compute tpus queued-resources create "$TPU_NAME" \
  --project="$PROJECT" --zone="$ZONE" --node-id="$TPU_NAME" \
  --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_RUNTIME" \
  --spot --quiet
