"""`megarl`, as one rank of torchrun's, that leaves something out of its checkpoints:
python -m tests.e2e.forgetful data|adam|schedule COMMAND ..."""

from __future__ import annotations

import os
import sys

import torch


def forget(what: str) -> None:
    from megarl import checkpoint
    from megarl.data.mixture import Mixture

    load = checkpoint._load_policy

    def without_moments(policy, state):
        load(policy, state)
        for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
            for moments in part.optimizer.state.values():
                torch.nn.init.zeros_(moments["exp_avg"])

    def without_schedule(policy, state):
        load(policy, state)
        policy.schedule.load_state_dict = lambda _state: None

    if what == "data":
        Mixture.load_state_dict = lambda self, state: None
    else:
        checkpoint._load_policy = {"adam": without_moments, "schedule": without_schedule}[what]


if __name__ == "__main__":
    what = sys.argv.pop(1)
    from megarl import cli, launcher, platform

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port())}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    platform.setup()
    forget(what)
    cli.main()
