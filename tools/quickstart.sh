#!/usr/bin/env bash
# A small MoE from random weights to GSPO on two CPU cores: SFT warm start, RL, evaluation, export, report.
#   tools/quickstart.sh [a.b=c ...]      overrides of configs/cpu/quickstart.yaml, for example seed=2
# MEGARL=megarl (a command) takes that installation and installs nothing; on one GPU add parallel.ep=1 parallel.nproc=1.
# After an interruption, run it again: it continues. A finished run is moved aside, never overwritten.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/cpu/quickstart.yaml
[ -n "${MEGARL:-}" ] || tools/setup.sh
read -ra megarl <<<"${MEGARL:-.venv/bin/megarl}"

run=runs/quickstart
for override in "$@"; do
    case $override in run_dir=*) run=${override#run_dir=} ;; esac
done
if [ -e "$run/summary.json" ]; then
    n=1
    while [ -e "$run.$n" ]; do n=$((n + 1)); done
    mv "$run" "$run.$n"
    echo "quickstart: the finished run is now $run.$n"
fi

"${megarl[@]}" sft "$config" resume=auto "$@"
"${megarl[@]}" train "$config" resume=auto "$@"

cat <<EOF

Open the report: $run/report.html
Next:
  ${megarl[*]} eval $config --checkpoint $run/rl/hf eval.samples=8    # avg@8 and pass@8
  ${megarl[*]} verify sync $config run_dir=$run                       # learner against engine, tensor by tensor
  ${megarl[*]} train $config run_dir=runs/grpo rl.init_from=model model.path=$run/sft/hf rl.algorithm.preset=grpo
  ${megarl[*]} config $config                                         # every setting, its meaning and origin
EOF
