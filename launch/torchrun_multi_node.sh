#!/usr/bin/env bash
# Trains on several machines that have no scheduler. Start it on every one of them, in any order.
#
#   bash FILE [ARGUMENT ...]    # FILE is this script
#
# Edit the lines below; they must be the same on all machines. Arguments are added to those of COMMAND and must be the
# same too. The run's folder must lie on a file system that all machines share, at least to resume or to load from it.

# What torchrun starts; or your script: (train.py --epochs 90)
COMMAND=(-m keepbest train examples/digits/config.yaml)
TORCHRUN=(torchrun)                # of your environment; in a container: (apptainer exec --nv train.sif torchrun)
NODES=2                            # number of machines
PROCESSES=gpu                      # on each machine: a number, or "gpu" for one process for each GPU
MEETING_POINT=node0:29500          # name of one of the machines, and a free port on it
RUN_ID=digits                      # any word; another one for each run that meets at the same point
THREADS=1                          # CPU threads of each process

# ---- what your machines need before training ------------------------------------------------------------------------
# source "$HOME/miniforge3/bin/activate" train  # conda
# export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=WARN # the network between the machines, and what NCCL says of it

# ---- nothing to edit below ------------------------------------------------------------------------------------------
set -euo pipefail

export OMP_NUM_THREADS="$THREADS"
exec "${TORCHRUN[@]}" --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$MEETING_POINT" --rdzv-id "$RUN_ID" \
    "${COMMAND[@]}" "$@"
