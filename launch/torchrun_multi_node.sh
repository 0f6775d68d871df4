#!/usr/bin/env bash
# Trains on several machines that have no scheduler. Start it on every one of them, in any order:
#
#   launch/torchrun_multi_node.sh [key=value ...]
#
# Edit the lines below; they must be the same on all machines. Arguments override settings of the config and must be the
# same too. The run's folder must lie on a file system that all machines share, at least to resume or to load from it.

CONFIG=examples/digits/config.yaml # the run: model, data, trainer and callbacks
NODES=2                            # number of machines
PROCESSES=gpu                      # on each machine: a number, or "gpu" for one process for each GPU
MEETING_POINT=node0:29500          # name of one of the machines, and a free port on it
RUN_ID=digits                      # any word; another one for each run that meets at the same point
THREADS=1                          # CPU threads of each process

# ---- nothing to edit below ------------------------------------------------------------------------------------------
set -euo pipefail

export OMP_NUM_THREADS="$THREADS"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$MEETING_POINT" --rdzv-id "$RUN_ID" \
    -m keepbest train "$CONFIG" "$@"
