#!/bin/bash
# Two machines without a scheduler, that share the folder of the run. On the first, then on the second:
#   configs/launch/two_machines.sh 0 FIRST_HOST RECIPE.yaml parallel=hsdp [key=value ...]
#   configs/launch/two_machines.sh 1 FIRST_HOST RECIPE.yaml parallel=hsdp [key=value ...]
# After a crash both end; start both again, and the run goes on from its last checkpoint. (--max-restarts is for one
# machine: the two torchruns restart apart from each other, and their ranks then wait for ones that are gone.)
set -eu
machine=$1 first=$2
shift 2
exec torchrun --nnodes 2 --node-rank "$machine" --nproc-per-node "${RANKS:-gpu}" \
  --master-addr "$first" --master-port "${PORT:-29500}" -m mmit train "$@"
