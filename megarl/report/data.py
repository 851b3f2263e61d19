"""What a run left behind, read into one value. Every piece may be missing: a run can be short, interrupted or SFT only.

Names of the metrics in `metrics.jsonl`, one object a step, `step` counted from 1 (0 = before the first update):

RL (`rl/metrics.jsonl`)
- `reward/<name>` each part of a weighted reward, before its factor
- `reward/mean` shaped reward, `reward/score` unshaped verifier score (the accuracy of the samples where scores are
  0 or 1), `reward/failed_fraction` responses that could not be scored
- `response/length_mean`, `response/length_max` in tokens, `response/truncated_fraction`
- `groups/zero_std_fraction` sampled prompt groups without a learning signal, `groups/all_right_fraction`,
  `groups/all_wrong_fraction`; with a filter `groups/sampled`, `groups/kept`, `groups/sampling_rounds`,
  `groups/carried_over` to the next step; `groups/trained_without_signal_fraction` of those trained on
- `policy/loss`, `policy/grad_norm` before clipping, `policy/lr`, `policy/entropy` nats per token, full softmax
- `policy/clip_high_frac`, `policy/clip_low_frac`, `policy/clip_frac` share of trained tokens, `policy/clip_seq_frac`
  share of sequences, `policy/zero_grad_frac` tokens without a policy gradient (clipped, or advantage 0)
- `policy/ratio_mean`, `policy/ratio_min`, `policy/ratio_max` at the algorithm's level; `policy/log_ratio_seq_std`
  spread of log s_i over sequences; `policy/kl_old_k1`, `policy/kl_old_k3`, `policy/kl_ref`
- `policy/gate_mean`, `policy/gate_min` of a soft gate, and both by the sign of the advantage (`_pos`, `_neg`);
  `policy/gate_half_closed_frac` tokens with a gate below 1/2; `policy/ratio_p99`
- `critic/loss`, `critic/explained_variance`, `critic/clip_frac`, `critic/value_mean`, `critic/return_mean`,
  `critic/return_std`, `critic/grad_norm`, `critic/lr`
- `mismatch/rho_*` old / rollout per token, per sequence (geometric mean) and product, `mismatch/kl_k1`,
  `mismatch/kl_k3`, `mismatch/logprob_gap`, `mismatch/log_ppl_difference`, `mismatch/chi2`: before any rejection;
  `mismatch/weight_mean`, `mismatch/kept_frac`, `mismatch/ess` of the weights
- `gap/logprob_mean`, `gap/logprob_max` |old - rollout| log-prob over sampled tokens
- `sync/gap_mean`, `sync/gap_max` the same on the probe sequences of a weight sync (`sync/unchecked` 1 instead, with
  rollout.sync_check = none); `sync/seconds` with the check, `sync/move_seconds` without it, of the slowest rank; over all
  ranks `sync/bytes_written` into the engines, of which `sync/bytes_moved` from other ranks and `sync/bytes_least` as few as
  could be; `sync/gb_per_second` written on a rank, `sync/of_plain_copy` that over the speed of a plain copy
- `routing/engine_*` engine against learner with the same weights, `routing/update_*` learner before against after the
  update, `routing/noise_*` two passes with the same weights (first step): `changed` share of experts, also by layer
  `/layer_NN`, `pair` share of (token, layer), `token_any` share of tokens; `routing/update_gate_mass`, and correlations
  `routing/engine_gap_correlation`, `routing/update_ratio_correlation`, `routing/update_clip_correlation`
- `routing/load_max_over_mean/layer_NN`, `routing/unused_experts/layer_NN`; `routing/live_fraction` of positions not replayed
- with `log.routing_variance`, of the log-ratio after the update with `_live` routing, with the experts of before
  (`_replayed`) and of their `_difference`: `routing/log_ratio_std_*` over tokens, `routing/log_ratio_seq_std_*` of its mean
  over sequences, `routing/log_ratio_within_*` correlation within a sequence; `routing/inverse_length` mean of 1 / n;
  `routing/variance_share` 1 - Var(replayed) / Var(live)
- `time/{sync,generate,reward,old_log_probs,update,eval,...}` seconds, mean over ranks; `time/step` slowest rank
- `throughput/rollout_tokens_per_second`, `throughput/learner_tokens_per_second`; `memory/rss_gib` over all ranks
- `memory/{device,host}/<phase>/<owner>` GiB of all ranks together at the end of a phase, where it is not 0: live storages of
  `policy_weights`, `policy_gradients`, `policy_optimizer`, `reference`, `critic`, `reward_model`, `engine_weights`,
  `engine_kv_cache`, `sync_buffers` (in the sync: the most of it), and the `rest`; beside them `rss` of all
- `eval/accuracy` on held-out problems, at the steps that evaluated
- `alarms/<name>` 1 in a step whose figure was above its threshold, else 0, where there is one to compare with;
  `alarms/skipped_updates` optimizer steps (of an RL step left out as a whole: 1) that were not applied (SFT and reward model too)

SFT (`sft/metrics.jsonl`): `sft/loss`, `sft/validation_loss`, `sft/lr`, `sft/grad_norm`, `time/step`, `memory/rss_gib`,
`throughput/learner_tokens_per_second`.

Reward model (`reward_model/metrics.jsonl`): as SFT with `reward_model/loss`, ..., and `reward_model/accuracy` share of
pairs whose chosen side scores higher, `reward_model/margin` chosen minus rejected score, `reward_model/score_mean`,
`reward_model/validation_loss`, `reward_model/validation_accuracy`.

`rl/eval.jsonl` has `step`, `accuracy`, `problems`, `source`; `rl/rollouts/step_*.jsonl` one trajectory a line with
`prompt`, `response`, `answer`, `score`, `shaped_reward`, `finish_reason`, `response_ids`, ...
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megarl.errors import BadInput
from megarl.metrics import read_jsonl

Row = dict[str, Any]
PHASES = ("rollout", "reference", "log_probs", "update", "sync")  # of the memory ledger, as they come in a step
SCANNED_TRAJECTORIES = 2_000  # of one rollout file: enough to find examples without reading gigabytes


@dataclass
class RunData:
    """One run folder. Lists are in step order and empty where the run has no such file."""

    run_dir: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    sft: list[Row] = field(default_factory=list)
    reward_model: list[Row] = field(default_factory=list)
    rl: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    rollouts: list[tuple[int, list[Row]]] = field(default_factory=list)  # the first and the last recorded step

    @property
    def planned_steps(self) -> int | None:
        return (self.config.get("rl") or {}).get("steps")

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary, which is the last thing it does."""
        return bool(self.summary)


def load_run(run_dir: Path) -> RunData:
    """Reads a run folder. Raises BadInput when it is no folder, or holds nothing a report could show."""
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: no such run folder; pass the run_dir of a config")
    config_text = _text(run_dir / "config.yaml")
    data = RunData(
        run_dir=run_dir,
        config=_yaml(run_dir / "config.yaml", config_text),
        config_text=config_text,
        summary=_summary(run_dir / "summary.json"),
        sft=_by_step(read_jsonl(run_dir / "sft" / "metrics.jsonl")),
        reward_model=_by_step(read_jsonl(run_dir / "reward_model" / "metrics.jsonl")),
        rl=_by_step(read_jsonl(run_dir / "rl" / "metrics.jsonl")),
        evals=_by_step(read_jsonl(run_dir / "rl" / "eval.jsonl")),
        rollouts=_first_and_last_rollouts(run_dir / "rl" / "rollouts"),
    )
    if not (data.sft or data.reward_model or data.rl or data.evals or data.summary):
        files = "sft/metrics.jsonl, rl/metrics.jsonl"
        raise BadInput(f"{run_dir}: no metrics yet ({files}); run megarl sft or megarl train first")
    return data


def points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) where the value is a finite number."""
    pairs = ((row["step"], row.get(key)) for row in rows)
    return [(step, float(y)) for step, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def mean_of(rows: list[Row], key: str) -> float | None:
    values = [y for _, y in points(rows, key)]
    return sum(values) / len(values) if values else None


def max_of(rows: list[Row], key: str) -> float | None:
    return max((y for _, y in points(rows, key)), default=None)


def phase_names(rows: list[Row]) -> list[str]:
    """The phases timed in these rows, the most expensive first."""
    names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")} - {"step"}
    return sorted(names, key=lambda name: -sum(y for _, y in points(rows, f"time/{name}")))


def memory_ledger(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Place -> phase -> owner -> GiB, of the last step that has it; without the process's whole resident memory."""
    last = next((row for row in reversed(rows) if any(key.startswith(("memory/host/", "memory/device/")) for key in row)), {})
    out: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in last.items():
        match key.split("/"):
            case ["memory", ("device" | "host") as place, phase, owner] if owner != "rss" and isinstance(value, float):
                out.setdefault(place, {}).setdefault(phase, {})[owner] = value
    return {place: {name: found[name] for name in PHASES if name in found} for place, found in sorted(out.items())}


def eval_points(data: RunData) -> dict[str, list[Row]]:
    """Held-out rows by source; from the metrics where there is no eval.jsonl."""
    rows = data.evals or [{"step": x, "accuracy": y} for x, y in points(data.rl, "eval/accuracy")]
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("accuracy"), int | float):
            by_source.setdefault(str(row.get("source") or "all"), []).append(row)
    return by_source


def figures(data: RunData) -> dict[str, Any]:
    """summary.json, with what it lacks (an interrupted run) taken from the metrics."""
    found = {
        "steps": data.rl[-1]["step"] if data.rl else None,
        "rollout_tokens_per_second": mean_of(data.rl, "throughput/rollout_tokens_per_second"),
        "learner_tokens_per_second": mean_of(data.rl, "throughput/learner_tokens_per_second"),
        "logprob_gap_mean": mean_of(data.rl, "gap/logprob_mean"),
        "logprob_gap_max": max_of(data.rl, "gap/logprob_max"),
        "experts_changed_update": mean_of(data.rl, "routing/update_changed"),
        "experts_changed_engine": mean_of(data.rl, "routing/engine_changed"),
        "peak_rss_gib": max_of(data.rl + data.reward_model + data.sft, "memory/rss_gib"),
    }
    overall = eval_points(data)
    rows = overall.get("all") or next(iter(overall.values()), [])
    before, after = [row for row in rows if row["step"] == 0], [row for row in rows if row["step"] > 0]
    if before:
        found["sft_accuracy"] = before[0]["accuracy"]
    if after:
        found["rl_accuracy"] = after[-1]["accuracy"]
    return {name: value for name, value in (*found.items(), *data.summary.items()) if value is not None}


def _first_and_last_rollouts(folder: Path) -> list[tuple[int, list[Row]]]:
    files = sorted(folder.glob("step_*.jsonl")) if folder.is_dir() else []
    chosen = [files[0], files[-1]] if len(files) > 1 else files
    return [(int(path.stem.removeprefix("step_")), _trajectories(path)) for path in chosen]


def _trajectories(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in islice(file, SCANNED_TRAJECTORIES):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the last line of an interrupted run
                break
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _by_step(rows: list[Row]) -> list[Row]:
    return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
        return found if isinstance(found, dict) else {}
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}: not YAML ({str(error).splitlines()[0]}); restore the config the run wrote") from None


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
        return found if isinstance(found, dict) else {}
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: not JSON; delete it and report again") from None
