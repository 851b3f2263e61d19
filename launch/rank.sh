#!/usr/bin/env bash
# One rank of a SLURM step: srun starts it on every node. Its number from SLURM, its environment from environment.sh.
#   rank.sh COMMAND...     the command's exit code is kept in $MEGARL_JOB_DIR/codes/rankN, whatever srun makes of all of them
set -uo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
export MEGARL_NODE=$SLURMD_NODENAME MEGARL_JOB=$SLURM_JOB_ID
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" || exit 2

trap : TERM USR1 INT HUP # the command gets them too; here they only end a wait
"$@" &
command=$!
until
    wait $command
    ! kill -0 $command 2>/dev/null
do :; done
wait $command # also after a signal has ended the wait above: bash keeps the code
code=$?
echo "$code" >"$MEGARL_JOB_DIR/codes/rank$RANK"
exit "$code"
