#!/usr/bin/env bash
# Fills in one of the manifests in this folder, and submits it to the cluster.
#
#   launch/gke/jobset.sh tpu|gpu
#
# JOB_NAME IMAGE CONFIG WORKDIR: launch/env.example
# DRY_RUN=1 only prints the manifest.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

if [[ ! ${1:-} =~ ^(tpu|gpu)$ ]] || (($# != 1)); then
  echo "usage: $0 tpu|gpu" >&2
  exit 2
fi
names=(JOB_NAME IMAGE CONFIG WORKDIR)
need "${names[@]}"

manifest=$(cat "$(dirname "$0")/jobset-$1.yaml")
for name in "${names[@]}"; do
  # The manifest has it in quotes, so this is all that could break it.
  if [[ ! ${!name} =~ ^[A-Za-z0-9._:/@=-]+$ ]]; then
    echo "$0: $name=${!name}: only letters, digits and . _ : / @ = - are allowed" >&2
    exit 2
  fi
  manifest=${manifest//"\${$name}"/"${!name}"}
done

if dry; then
  echo "$manifest"
else
  kubectl apply -f - <<< "$manifest"
fi
