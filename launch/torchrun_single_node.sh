#!/usr/bin/env bash
# Trains on the processes of this machine, one for each GPU.
#
#   launch/torchrun_single_node.sh [key=value ...]
#
# Edit the lines below. Arguments override settings of the config: launch/torchrun_single_node.sh trainer.epochs=3
# Without GPUs the same works on CPUs: set PROCESSES to the number of processes that you want.

CONFIG=examples/digits/config.yaml # the run: model, data, trainer and callbacks
PROCESSES=gpu                      # a number, or "gpu" for one process for each GPU
THREADS=1                          # CPU threads of each process

# ---- nothing to edit below ------------------------------------------------------------------------------------------
set -euo pipefail

export OMP_NUM_THREADS="$THREADS"
exec torchrun --standalone --nproc-per-node "$PROCESSES" -m keepbest train "$CONFIG" "$@"
