#!/usr/bin/env bash
# Copies the committed code to all hosts of the TPU, and installs it there.
#
#   launch/tpu_vm/setup.sh
#
# PROJECT ZONE TPU_NAME: launch/env.example
# DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if (($#)); then
  echo "usage: $0, without arguments" >&2
  exit 2
fi
need PROJECT ZONE TPU_NAME

root=$(dirname "$0")/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
where=(--project="$PROJECT" --zone="$ZONE" --worker=all --quiet)

call git -C "$root" archive --format=tar.gz --output="$folder/mdm_jax.tar.gz" \
  HEAD
call gcloud compute tpus tpu-vm scp "$folder/mdm_jax.tar.gz" \
  "$TPU_NAME:mdm_jax.tar.gz" "${where[@]}"
# Delete the old tree first, so that files deleted here do not stay there.
call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" \
  --command="rm -rf mdm_jax && mkdir mdm_jax && \
tar -xzf mdm_jax.tar.gz -C mdm_jax && bash mdm_jax/launch/tpu_vm/worker.sh install"
