# Sourced by rank.sh and torchrun.sh: what a rank finds in its environment, in this one place. What is set already wins.
# Needs PYTHON, MASTER_ADDR (an address of the first node) and LOCAL_WORLD_SIZE (ranks on this node).
# shellcheck shell=bash

default() { [ -n "${!1:-}" ] || export "$1=$2"; }

# rendezvous: the interface that reaches the first node, so that host names, VPNs and bridges of containers do not matter
read -r MEGARL_INTERFACE MEGARL_ADDRESS MEGARL_IS_FIRST < <("$PYTHON" -m megarl.cluster.interface "$MASTER_ADDR") || return 2
export MEGARL_ADDRESS
default GLOO_SOCKET_IFNAME "$MEGARL_INTERFACE"
default NCCL_SOCKET_IFNAME "$MEGARL_INTERFACE"

# NCCL: say what is wrong, end the process when a peer is lost, keep the last collectives for the log of a hang
default NCCL_DEBUG WARN
default TORCH_NCCL_ASYNC_ERROR_HANDLING 1
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_BUFFER_SIZE 2000
default CUDA_DEVICE_MAX_CONNECTIONS 1 # the order in which Megatron starts communication and products beside it

# threads: the node's cores, shared out
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=${SLURM_CPUS_PER_TASK:-$(($(nproc) / LOCAL_WORLD_SIZE))}
    export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))
fi
default TOKENIZERS_PARALLELISM false
default PYTHONUNBUFFERED 1

# temporary files: in one folder on the node that goes with the job; what is compiled stays on the node for the next start
default MEGARL_SCRATCH "${TMPDIR:-/tmp}/megarl-${MEGARL_JOB_ID:-$$}"
mkdir -p "$MEGARL_SCRATCH" || return 2
compiled=${TMPDIR:-/tmp}
default TORCHINDUCTOR_CACHE_DIR "$compiled/torchinductor_$(id -u)"
default TRITON_CACHE_DIR "$compiled/triton_$(id -u)"
export TMPDIR=$MEGARL_SCRATCH

# vLLM: the address for engines that span nodes; its allocator for sleep and PyTorch's expandable segments exclude each other
default VLLM_HOST_IP "$MEGARL_ADDRESS"
default VLLM_NO_USAGE_STATS 1
default VLLM_CACHE_ROOT "$compiled/vllm_$(id -u)" # which models it knows costs a minute to find out, and homes are shared
case ${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-}} in
*expandable_segments:True*) echo "warning: expandable_segments: vLLM cannot sleep with it; unset PYTORCH_ALLOC_CONF" >&2 ;;
esac
