#!/usr/bin/env bash
# Every layout that eight processes allow, in float64 and in float32, on a small model of the config's kind; the tables
# go to tools/bench/results/layouts.md. 37 minutes on two cores with other work on them.
#   tools/verify_all_layouts.sh [CONFIG]      default: configs/cpu/quickstart.yaml
# MEGARL="/path/to/python -m megarl" takes an installation that is already there instead of making one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${1:-configs/cpu/quickstart.yaml}
results=tools/bench/results/layouts.md
if [ -z "${MEGARL:-}" ]; then
    tools/setup.sh
    MEGARL=.venv/bin/megarl
fi
plain=one+unpacked,one+permuted,one+budget80,one+recompute,one+selective
dense=dp2,tp2,tp4,pp2,pp4,pp2vpp2,cp2,cp4,tp2pp2,tp2cp2,pp2cp2,tp2cp2pp2,dp2pp2vpp2,dp2tp2,dp2cp2
experts=ep2,ep4,etp2,tp2ep2,tp2ep4,tp2etp2,ep2etp2,cp2ep2,cp2ep4,tp2pp2ep2,dp4pp2ep2,tp2cp2ep2,tp2cp2pp2ep2,pp2vpp2ep2
options=pp2vpp2+recompute,cp2+selective,tp2ep2+recompute,tp2cp2pp2+selective,ep2+allgather,tp2ep2+allgather
options+=,cp2ep2+allgather+permuted,tp2pp2ep2+budget80
sharded=dp2+distopt,dp4+distopt,ep2+distopt,tp2ep2+distopt,cp2ep2+distopt,pp2vpp2+distopt,dp2tp2pp2+distopt

code=0
tables=$(mktemp)
trap 'rm -f "$tables"' EXIT
for dtype in float64 float32; do
    layouts=$plain,$dense,$experts,$options
    [ $dtype = float32 ] && layouts+=,$sharded
    command="megarl verify layouts $config --dtype $dtype --nproc 8 --layouts $layouts"
    echo "$command"
    printf '\n## %s\n\n    %s\n\n```\n' "$dtype" "$command" >>"$tables"
    $MEGARL ${command#megarl } 2>&1 | tee -a "$tables" || code=1
    printf '```\n' >>"$tables"
done
versions=$($MEGARL doctor | awk '$1 == "torch" || $1 == "megatron-core" { printf "%s%s %s", sep, $1, $2; sep = ", " }')
{
    printf '# Layouts against one process\n\n    tools/verify_all_layouts.sh\n\n'
    cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    printf '%s, %s cores (%s); %s.\n\n' "$(date +%F)" "$(env -u OMP_NUM_THREADS nproc)" "$cpu" "$versions"
    cat <<'EOF'
A line is one optimizer step with one loss in one layout. `loss`: difference / max(1, |loss|). `norm`: of the gradient,
relative, the worse of both steps and of all ranks. `gradient`, `sgd`, `adam`: the worst tensor, |difference| / |tensor|, of
the gradient and of the weights after an SGD and an Adam step, over all ranks' copies; a gradient below 1e-6 of the whole
gradient's norm is compared with that. Gradients are those of the SGD step, without the distributed optimizer; `+distopt`
is the Adam step's. Adam has eps 1e-3, so that the sign of a tiny gradient does not decide.
EOF
    cat "$tables"
} >"$results"
exit $code
