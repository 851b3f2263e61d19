"""Sampled trajectories on disk: one JSON object a trajectory, one file a step, and back."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megarl.errors import BadInput
from megarl.types import Prompt, PromptGroup, Trajectory


def rollout_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"


def check_files(folder: Path, steps: int) -> None:
    """Raises BadInput unless there is a file for each of the steps."""
    for step in range(1, steps + 1):
        if not rollout_file(folder, step).is_file():
            raise BadInput(
                f"{rollout_file(folder, step)}: no such file; --from-rollouts needs one for each of the {steps} steps "
                f"(log.rollouts_every: 1 writes them); set rl.steps to {step - 1 or 'what the folder has'}"
            )


def check_experts(folder: Path, layers: int, top_k: int) -> None:
    """Raises BadInput unless the first trajectory has the experts of every token in `layers` MoE layers, `top_k` each."""
    path = rollout_file(folder, 1)
    routed = read_groups(path)[0].trajectories[0].routed_experts
    if routed is None or routed.shape[1:] != (layers, top_k):
        found = "no experts" if routed is None else f"{routed.shape[1]} MoE layers with {routed.shape[2]} experts a token"
        raise BadInput(
            f"{path}: {found} recorded, and the model has {layers} MoE layers with {top_k}; "
            "set rl.routing_replay to none or old"
        )


def write_groups(path: Path, groups: list[PromptGroup]) -> None:
    """Write every trajectory of the groups; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for group in groups:
            for trajectory in group.trajectories:
                out.write(json.dumps(to_row(group.prompt, trajectory)) + "\n")
    partial.replace(path)


def read_groups(path: Path) -> list[PromptGroup]:
    """The groups of `write_groups`, in the same order. Raises BadInput naming the line that cannot be read."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason}); give a rollouts/ folder of a run") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a rollouts/ folder with a file for every step") from None
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(from_row(_checked(json.loads(line))))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadInput(f"{path}:{number}: not a trajectory ({type(error).__name__}: {error})") from None
    return to_groups(rows)


def to_groups(rows: Iterable[tuple[Prompt, Trajectory]]) -> list[PromptGroup]:
    """Trajectories of one group id together, in the order in which the groups first appear."""
    groups: dict[str, PromptGroup] = {}
    for prompt, trajectory in rows:
        group = groups.setdefault(trajectory.group_id, PromptGroup(trajectory.group_id, prompt, []))
        group.trajectories.append(trajectory)
    return list(groups.values())


def to_row(prompt: Prompt, t: Trajectory) -> dict[str, Any]:
    """One trajectory with its prompt as a JSON object."""
    routed = None
    if t.routed_experts is not None:
        experts = np.ascontiguousarray(t.routed_experts)  # one or two bytes each: as numbers they would fill the file
        routed = {"dtype": str(experts.dtype), "shape": experts.shape, "base64": base64.b64encode(experts).decode()}
    return {
        "group_id": t.group_id,
        "sample_index": t.sample_index,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "prompt": prompt.text,
        "response": t.text,
        "answer": prompt.answer,
        "score": t.score,
        "shaped_reward": t.shaped_reward,
        "reward_failed": t.reward_failed,
        "rewards": t.rewards,
        "finish_reason": t.finish_reason,
        "prompt_ids": t.prompt_ids,
        "response_ids": t.response_ids,
        "response_mask": t.response_mask.tolist(),
        "rollout_log_probs": [float(x) for x in t.rollout_log_probs],
        "policy_version": t.policy_version.tolist(),
        "routed_experts": routed,
        "reward": prompt.reward,
        "metadata": prompt.metadata,
    }


def from_row(row: dict[str, Any]) -> tuple[Prompt, Trajectory]:
    """The inverse of `to_row`."""
    prompt = Prompt(
        row["prompt_id"],
        tuple(row["prompt_ids"]),
        row["answer"],
        row["reward"],
        row["source"],
        row["prompt"],
        row["metadata"],
    )
    routed = row["routed_experts"]
    return prompt, Trajectory(
        group_id=row["group_id"],
        sample_index=row["sample_index"],
        prompt_ids=row["prompt_ids"],
        response_ids=row["response_ids"],
        response_mask=np.array(row["response_mask"], np.uint8),
        rollout_log_probs=np.array(row["rollout_log_probs"], np.float32),
        finish_reason=row["finish_reason"],
        policy_version=np.array(row["policy_version"], np.int32),
        text=row["response"],
        routed_experts=None if routed is None else _experts(routed),
        score=row["score"],
        shaped_reward=row["shaped_reward"],
        reward_failed=row["reward_failed"],
        rewards=row.get("rewards", {}),
    )


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row, if its values are of the kinds that `to_row` writes. Raises ValueError, KeyError or TypeError."""
    for key in ("group_id", "prompt_id", "source", "prompt", "response", "finish_reason"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} is {row[key]!r:.60}, not a text")
    for key in ("prompt_ids", "response_ids"):
        if not isinstance(row[key], list) or any(type(token) is not int or not 0 <= token < 2**31 for token in row[key]):
            raise TypeError(f"{key} is not a list of token ids")
    for key in ("response_mask", "rollout_log_probs", "policy_version"):
        if not isinstance(row[key], list) or len(row[key]) != len(row["response_ids"]):
            raise ValueError(f"{key} has not one value for each of {len(row['response_ids'])} tokens")
    for key in ("score", "shaped_reward"):
        if row[key] is not None and (isinstance(row[key], bool) or not isinstance(row[key], int | float)):
            raise TypeError(f"{key} is {row[key]!r:.60}, not a number")
    if not isinstance(row["metadata"], dict) or not isinstance(row.get("rewards", {}), dict):
        raise TypeError("metadata and rewards must be objects")
    return row


def _experts(saved: dict[str, Any]) -> np.ndarray:
    if saved["dtype"] not in ("uint8", "uint16", "int16", "int32", "int64"):
        raise ValueError(f"experts of dtype {saved['dtype']!r:.40}")
    return np.frombuffer(base64.b64decode(saved["base64"]), saved["dtype"]).reshape(saved["shape"]).copy()
