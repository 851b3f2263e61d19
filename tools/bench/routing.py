"""What routing replay costs: the same RL steps with none, with the engine's record replayed, and with the watch as well.

    .venv/bin/python tools/bench/routing.py --model 20m --rounds 10

The runs of vs_trl.py, megarl alone: started together, then stepping in turns, each stopped while another one runs, so
that both see the same machine. The engine of `none` records nothing. Prints a step's time and CPU time as ratios to it,
and the bytes of a token's record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

from make_model import SHAPES
from vs_trl import (
    CORES,
    MODELS,
    ROOT,
    WORK,
    BenchFailed,
    Side,
    describe,
    ensure_model,
    megarl_config,
    positive,
    print_ratio,
    started,
    take_turns,
)

HERE = Path(__file__).resolve().parent
SIDES = {  # rl.routing_replay, log.routing_tokens
    "none": ("none", 0),
    "rollout": ("rollout", 0),
    "rollout and watch": ("rollout", 512),
}


def side(name: str, model: Path, ep: int) -> Side:
    label = f"routing-{model.name}-{name.replace(' ', '-')}"
    out = WORK / f"out-{label}"
    shutil.rmtree(out, ignore_errors=True)
    settings = megarl_config(model, out, ep)
    settings["rl"]["routing_replay"], settings["log"]["routing_tokens"] = SIDES[name]
    config = WORK / f"{label}.yaml"
    config.write_text(json.dumps(settings, indent=1))
    command = [sys.executable, str(HERE / "megarl_side.py"), str(config)]
    return Side(name, command, CORES, 1, {"PYTHONPATH": f"{ROOT}:{HERE}"}, WORK / f"{label}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="20m")
    parser.add_argument("--rounds", type=positive, default=10, help="measured steps of each run (default 10)")
    parser.add_argument("--ep", type=int, choices=(1, 2), default=1, help="expert parallel degree (default 1)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # both close the sides
    try:
        model, shape = ensure_model(arguments.model, Path(sys.executable)), SHAPES[arguments.model]
        with started([side(name, model, arguments.ep) for name in SIDES]) as sides:
            take_turns(sides, 1, keep=False)
            take_turns(sides, arguments.rounds)
    except BenchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    layers, top_k, experts = shape["num_hidden_layers"], shape["num_experts_per_tok"], shape["num_experts"]
    size = layers * top_k * (1 if experts <= 256 else 2)
    print(f"{arguments.model}: {layers} layers x {top_k} of {experts} experts = {size} bytes a token")
    for one in sides:
        print(describe(one))
    for one in sides[1:]:
        print_ratio(f"{one.name}/none {arguments.model}", one, sides[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
