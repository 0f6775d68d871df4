#!/usr/bin/env bash
# Trains on the processes of this machine, one for each GPU.
#
#   bash FILE [ARGUMENT ...]    # FILE is this script
#
# Edit the lines below. Arguments are added to those of COMMAND: bash FILE trainer.epochs=3
# Without GPUs the same works on CPUs: set PROCESSES to the number of processes that you want.

# What torchrun starts; or your script: (train.py --epochs 90)
COMMAND=(-m keepbest train examples/digits/config.yaml)
TORCHRUN=(torchrun)                # of your environment; in a container: (apptainer exec --nv train.sif torchrun)
PROCESSES=gpu                      # a number, or "gpu" for one process for each GPU
THREADS=1                          # CPU threads of each process

# ---- what your machine needs before training ------------------------------------------------------------------------
# source "$HOME/miniforge3/bin/activate" train  # conda
# export NCCL_DEBUG=WARN  # what NCCL says of the network

# ---- nothing to edit below ------------------------------------------------------------------------------------------
set -euo pipefail

export OMP_NUM_THREADS="$THREADS"
exec "${TORCHRUN[@]}" --standalone --nproc-per-node "$PROCESSES" "${COMMAND[@]}" "$@"
