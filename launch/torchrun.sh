#!/usr/bin/env bash
# One node's ranks under torchrun, without a scheduler: run the same command on every node.
#   torchrun.sh [options] -- train CONFIG [a.b=c ...]        what follows -- is given to `python -m megarl`
#     --nodes N            1          --ranks-per-node N     GPUs of this node, or 1
#     --master HOST:PORT   an address of the first node that the others reach (127.0.0.1:29500)
#     --max-restarts N     0: how often all ranks are started again, from the newest checkpoint, after a fault
#     --id NAME            of this start, the same on every node           --no-check   do not look at the nodes first
# Variables: PYTHON, MEGARL_JOB_DIR (this start's own files, runs/launch), MEGARL_NODE (this node's name), and what
# environment.sh sets. SIGTERM and SIGUSR1 make the ranks save at the end of their step. Exit codes: launch/README.md.
set -uo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() { echo "error: $1" >&2; exit 2; }

nodes=1 ranks='' master=127.0.0.1:29500 restarts=0 id=megarl check=yes
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --no-check) check=no; shift; continue ;;
    --nodes | --ranks-per-node | --max-restarts) [[ ${2:-} =~ ^[0-9]+$ ]] || refuse "$1 ${2:-}: give a number" ;;&
    --nodes) nodes=$2 ;;
    --ranks-per-node) ranks=$2 ;;
    --max-restarts) restarts=$2 ;;
    --master) master=${2:-} ;;
    --id) id=${2:-} ;;
    *) refuse "$1: no such option; options are named at the top of $0" ;;
    esac
    shift 2
done
[ $# -gt 1 ] || refuse "nothing to run; give -- COMMAND CONFIG"
shift
: "${PYTHON:=python3}" "${MEGARL_JOB_DIR:=runs/launch/$id}"
[ -n "$ranks" ] || ranks=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ "$ranks" -gt 0 ] || ranks=1
export PYTHON MEGARL_JOB_DIR MEGARL_JOB_ID=$id-$$ MASTER_ADDR=${master%:*} LOCAL_WORLD_SIZE=$ranks
export MEGARL_NODE=${MEGARL_NODE:-$(hostname)}
source "$launch/environment.sh" || exit 2
trap 'rm -rf "$MEGARL_SCRATCH"' EXIT
port=${master##*:}
unset MASTER_ADDR LOCAL_WORLD_SIZE

# torchrun hands these to the ranks; by itself it would not know USR1, which would end it
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
join_seconds=${MEGARL_JOIN_SECONDS:-600} # for the other nodes, at the start and at a restart
got=
agent=
hand_on() {
    got=${got:-$1}
    [ -z "$agent" ] || kill "-$1" "$agent" 2>/dev/null
}
for number in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064
    trap "hand_on $number" $number
done

# An agent whose first node is out of reach asks for it again and again, long after its ranks have failed. One whose ranks
# are done waits up to five minutes for those of the other nodes.
end_idle() {
    local idle=0 failed=no most child status
    while kill -0 "$1" 2>/dev/null; do
        sleep 1
        idle=$((idle + 1))
        for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
            status=$(sed 's/.*) //' "/proc/$child/stat" 2>/dev/null) || continue
            case $status in # the first word is its state, the last its exit code, once it has one
            Z*" 0") ;;
            Z*) failed=yes ;;
            *) idle=0 failed=no ;;
            esac
        done
        most=$([ $failed = yes ] && echo "${MEGARL_IDLE_SECONDS:-20}" || echo $((330 + join_seconds)))
        [ $idle -le $most ] || kill -KILL "$1" 2>/dev/null
    done
}

# start NAME MODULE...: torchrun's exit code
start() {
    local name=$1
    shift
    "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 \
        --rdzv-backend c10d --rdzv-id "$id-$name" --rdzv-endpoint "${master%:*}:$port" --local-addr "$MEGARL_ADDRESS" \
        --rdzv-conf "is_host=$([ "$MEGARL_IS_FIRST" = yes ] && echo 1 || echo 0),join_timeout=$join_seconds" \
        --monitor-interval 1 -m "$@" &
    agent=$!
    end_idle $agent &
    port=$((port + 1)) # the old one may linger
    until
        wait $agent 2>/dev/null
        ! kill -0 $agent 2>/dev/null
    do :; done
    wait $agent 2>/dev/null
    local code=$?
    agent=
    return $code
}

if [ $check = yes ]; then
    start check megarl.cluster.node_check || exit $?
else
    port=$((port + 1))
fi
# Restarts are made here, each a rendezvous of its own: agents that restart on their own accord can meet addresses that an
# earlier attempt has left in their store, when several nodes fail at slightly different times.
again=0 code=0
until start "run-$again" megarl "$@"; do
    code=$?
    [ -z "$got" ] || break
    [ ! -f "$MEGARL_JOB_DIR/nodes.json" ] || "$PYTHON" -m megarl.cluster.peers "$MEGARL_JOB_DIR/nodes.json"
    [ $again -lt "$restarts" ] || exit $code
    again=$((again + 1))
    [ $again -gt 1 ] || set -- "$@" resume=auto
    echo "starting the ranks again ($again of $restarts)" >&2
done
[ -z "$got" ] || exit $((128 + $(kill -l "$got")))
