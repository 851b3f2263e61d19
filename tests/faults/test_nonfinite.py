"""A loss that is not finite: left out, counted, kept, and found again by `megarl replay`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.program import Project

BROKEN = [f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("up", "down")]


def test_steps_are_skipped_and_counted_and_the_layer_is_found(warm: Project, tmp_path: Path) -> None:
    """One expert of the second layer has weights so large that its output overflows; they are finite themselves."""
    project = Project.create(tmp_path)
    shards = warm.run / "sft/hf"
    project.model.mkdir()
    for path in shards.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in tensors.keys() & set(BROKEN):
                tensors[name] = torch.full_like(tensors[name], 1e30)
            save_file(tensors, project.model / path.name, metadata={"format": "pt"})
        else:
            (project.model / path.name).write_bytes(path.read_bytes())
    alone = ["parallel.ep=1", "parallel.nproc=1", "model.generate=none"]
    done = project.megarl("sft", project.config, *alone, "alarms.on_nonfinite=skip", "alarms.max_skips=2")
    assert done.returncode == 1
    assert "sft step 3, update: " in done.stderr and "It is skip 3 in 100 steps" in done.stderr, done.stderr
    assert [row["alarms/skipped_updates"] for row in project.rows("sft/metrics.jsonl")] == [1, 1]
    kept = sorted((project.run / "sft/failed").iterdir())
    assert [path.name for path in kept] == [f"step_{n:06d}_rank0.safetensors" for n in (1, 2, 3)]
    again = project.megarl("replay", kept[1])
    assert again.returncode == 1
    assert "first tensor that is not finite is output of decoder.layers.1.mlp.experts" in again.stderr, again.stderr
    assert "gradient norm    nan" in again.stdout or "gradient norm    inf" in again.stdout
