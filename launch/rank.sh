#!/usr/bin/env bash
# One rank of a SLURM step: srun starts it on every node. Its number from SLURM, its environment from environment.sh.
#   rank.sh COMMAND...     the command's exit code is kept in $MEGARL_JOB_DIR/codes/rankN, whatever srun makes of all of them
set -uo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
export MEGARL_NODE=$SLURMD_NODENAME MEGARL_JOB_ID=$SLURM_JOB_ID
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" || exit 2

"$@" &
command=$!
# a signal for the whole step has reached the command too; one for the tasks alone has not
for number in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064
    trap "kill -$number $command 2>/dev/null" $number
done
until
    wait $command 2>/dev/null
    ! kill -0 $command 2>/dev/null
do :; done
wait $command 2>/dev/null # also after a signal has ended the wait above: bash keeps the code
code=$?
case $code in
129 | 130 | 138 | 143) ;; # it was asked to stop
*) [ $code -le 128 ] || echo "error: rank $RANK: died by SIG$(kill -l $code) on node $MEGARL_NODE" >&2 ;;
esac
echo "$code" >"$MEGARL_JOB_DIR/codes/rank$RANK"
exit "$code"
