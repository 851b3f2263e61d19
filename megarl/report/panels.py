"""Which charts a report shows, section by section; a chart without data leaves no trace."""

from __future__ import annotations

import math
import re
from typing import Any

from megarl.report.bars import Bars, render_bars
from megarl.report.charts import Chart, Point, Series, render
from megarl.report.data import Row, RunData, eval_points, max_of, memory_ledger, phase_names, points
from megarl.report.heat_map import HeatMap, render_heat_map

Panel = Chart | HeatMap | Bars
Section = tuple[str, str, list[Panel]]  # anchor, heading, panels


def sections(data: RunData) -> list[tuple[str, str, str]]:
    """(anchor, heading, HTML of the charts) of every section that has something to show."""
    drawn = [(anchor, heading, "".join(map(_draw, panels))) for anchor, heading, panels in _sections(data)]
    return [section for section in drawn if section[2]]


def _draw(panel: Panel) -> str:
    renderers = {HeatMap: render_heat_map, Bars: render_bars, Chart: render}
    return renderers[type(panel)](panel)


def _sections(data: RunData) -> list[Section]:
    return [
        ("learning", "Learning", _learning(data)),
        ("update", "Policy update", _update(data.rl)),
        ("agreement", "Learner and engine agreement", _agreement(data)),
        ("routing", "Routing", _routing(data.rl)),
        ("cost", "Time and memory", _cost(data.rl)),
        ("sft", "Supervised warm start", _sft(data.sft)),
        ("reward-model", "Reward model", _reward_model(data.reward_model)),
    ]


def _series(rows: list[Row], *keys: tuple[str, str], smooth: bool = False) -> list[Series]:
    return [Series(name, points(rows, key), smooth=smooth) for name, key in keys]


def _learning(data: RunData) -> list[Chart]:
    rl = data.rl
    held_out = [_accuracy(source, rows) for source, rows in sorted(eval_points(data).items())]
    interval = " The shade is a 95% interval." if any(series.band for series in held_out) else ""
    return [
        Chart(
            "Held-out accuracy",
            f"Problems the policy never trained on; step 0 is before RL.{interval}",
            held_out,
            unit="%",
            from_zero=True,
            x_name="RL step",
        ),
        Chart(
            "Reward of the samples",
            "Mean per step of the verifier's score, and of the shaped reward where it differs.",
            _rewards(rl),
        ),
        Chart(
            "Response length",
            "Tokens per sampled response.",
            _series(rl, ("mean", "response/length_mean"), ("longest", "response/length_max"), smooth=True),
            from_zero=True,
        ),
        Chart(
            "Lost samples",
            "Truncated at the length limit, not scorable, and groups whose rewards are all equal (no signal).",
            _series(
                rl,
                ("truncated", "response/truncated_fraction"),
                ("failed rewards", "reward/failed_fraction"),
                ("groups without signal", "groups/zero_std_fraction"),
                smooth=True,
            ),
            unit="%",
            from_zero=True,
        ),
        Chart(
            "Entropy",
            "Of the full softmax over trained tokens, in nats per token.",
            _series(rl, ("entropy", "policy/entropy"), smooth=True),
            from_zero=True,
        ),
    ]


def _rewards(rl: list[Row]) -> list[Series]:
    score, shaped = _series(rl, ("score", "reward/score"), ("shaped reward", "reward/mean"), smooth=True)
    return [score] if score.points == shaped.points else [score, shaped]


def _accuracy(source: str, rows: list[Row]) -> Series:
    at = [(row["step"], float(row["accuracy"])) for row in rows]
    counted = all(row.get("problems") for row in rows)
    band = [_wilson(y, row["problems"]) for (_, y), row in zip(at, rows, strict=True)] if counted else None
    return Series("accuracy" if source == "all" else source, at, band=band)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    z2 = 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(share * (1 - share) * z2 / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _update(rl: list[Row]) -> list[Chart]:
    return [
        Chart(
            "Clipped and idle tokens",
            "Share of trained tokens outside the trust region, and of those without a policy gradient at all.",
            _series(
                rl,
                ("clipped", "policy/clip_frac"),
                ("above", "policy/clip_high_frac"),
                ("below", "policy/clip_low_frac"),
                ("no gradient", "policy/zero_grad_frac"),
                smooth=True,
            ),
            unit="%",
            from_zero=True,
        ),
        Chart(
            "Importance ratio",
            "At the algorithm's level: learner now against learner before the first update of the rollout.",
            _series(
                rl, ("largest", "policy/ratio_max"), ("mean", "policy/ratio_mean"), ("smallest", "policy/ratio_min")
            ),
        ),
        Chart(
            "Distance from the old policy",
            "KL(old, new) per token by the k3 estimator, and the spread of log s over sequences.",
            _series(
                rl,
                ("KL k3", "policy/kl_old_k3"),
                ("spread of log s", "policy/log_ratio_seq_std"),
            ),
            log=True,
        ),
        Chart(
            "Soft gate",
            "What multiplies the unbounded gradient, by the sign of the advantage.",
            _series(
                rl,
                ("A > 0", "policy/gate_mean_pos"),
                ("A < 0", "policy/gate_mean_neg"),
                ("smallest", "policy/gate_min"),
            ),
        ),
        Chart(
            "Explained variance of the value model",
            "1 - Var(return - value) / Var(return): 1 is perfect, 0 is no better than the mean.",
            _series(rl, ("explained variance", "critic/explained_variance"), smooth=True),
        ),
        Chart(
            "Value loss",
            "Half the squared error under the token weights.",
            _series(rl, ("loss", "critic/loss"), smooth=True),
            from_zero=True,
        ),
        Chart(
            "KL to the reference",
            "The estimator of the loss or of the reward, per token.",
            _series(rl, ("KL", "policy/kl_ref"), smooth=True),
        ),
        Chart(
            "Gradient norm",
            "Before clipping, mean over the optimizer steps of a rollout.",
            _series(rl, ("gradient norm", "policy/grad_norm"), smooth=True),
            from_zero=True,
        ),
        Chart(
            "Policy loss",
            "Its level means nothing; look for jumps.",
            _series(rl, ("loss", "policy/loss"), smooth=True),
        ),
        Chart(
            "Learning rate",
            "At the last optimizer step of the rollout.",
            _series(rl, ("lr", "policy/lr")),
            from_zero=True,
        ),
    ]


def _agreement(data: RunData) -> list[Chart]:
    threshold = (data.config.get("rollout") or {}).get("sync_threshold")
    return [
        Chart(
            "Log-prob gap on sampled tokens",
            "Absolute difference between the learner's and the engine's log-prob of the same token.",
            _series(data.rl, ("largest", "gap/logprob_max"), ("mean", "gap/logprob_mean")),
            log=True,
        ),
        Chart(
            "Correction for the gap",
            "Weights of the policy term: the share of tokens kept, and the effective sample size.",
            _series(data.rl, ("kept", "mismatch/kept_frac"), ("effective sample size", "mismatch/ess")),
            unit="%",
        ),
        Chart(
            "Log-prob gap at weight sync",
            "The same on the probe sequences every sync is checked with.",
            _series(data.rl, ("largest", "sync/gap_max"), ("mean", "sync/gap_mean")),
            log=True,
            lines=[("limit for the mean", threshold)] if threshold else [],
        ),
    ]


def _routing(rl: list[Row]) -> list[Panel]:
    floor = max_of(rl, "routing/noise_changed")
    return [
        Chart(
            "Experts changed",
            "Share of a token's experts that the other routing did not choose (expert level), on the watched tokens: the "
            "engine's against the learner's with the same weights, and the learner's before against after the update.",
            _series(
                rl,
                ("engine against learner", "routing/engine_changed"),
                ("update", "routing/update_changed"),
                smooth=True,
            ),
            unit="%",
            from_zero=True,
            lines=[] if floor is None else [("noise floor: two passes, same weights", floor)],
        ),
        Chart(
            "Changes by layer and by token",
            "Pair: (token, layer) with any changed expert. Token: tokens with a change in at least one layer.",
            _series(
                rl,
                ("engine, pair", "routing/engine_pair"),
                ("engine, token", "routing/engine_token_any"),
                ("update, pair", "routing/update_pair"),
                ("update, token", "routing/update_token_any"),
                smooth=True,
            ),
            unit="%",
            from_zero=True,
        ),
        Chart(
            "Gate mass of new experts",
            "Weight that a token gives to experts which the update brought in, mean over tokens and layers.",
            _series(rl, ("update", "routing/update_gate_mass"), smooth=True),
            unit="%",
            from_zero=True,
        ),
        Chart(
            "Routing changes and log-probs",
            "Correlation, over tokens, of the number of layers whose experts changed with the gap to the engine, with the "
            "size of the log-ratio after the update, and with being clipped.",
            _series(
                rl,
                ("gap to the engine", "routing/engine_gap_correlation"),
                ("log-ratio", "routing/update_ratio_correlation"),
                ("clipped", "routing/update_clip_correlation"),
                smooth=True,
            ),
        ),
        Chart(
            "Spread of the log-ratio",
            "Over tokens after the update: with the experts of now, with those of before, and what the change of experts "
            "adds; and of log s over sequences.",
            _series(
                rl,
                ("token, live routing", "routing/log_ratio_std_live"),
                ("token, replayed", "routing/log_ratio_std_replayed"),
                ("difference", "routing/log_ratio_std_difference"),
                ("sequence, live", "routing/log_ratio_seq_std_live"),
                smooth=True,
            ),
            from_zero=True,
        ),
        Chart(
            "Share of routing in the variance",
            "1 - Var(z with the experts of before) / Var(z), z the log-ratio of a token after the update.",
            _series(rl, ("share", "routing/variance_share"), smooth=True),
            unit="%",
        ),
        Chart(
            "Load of the fullest expert",
            "Tokens of a layer's fullest expert over the mean, in the update: 1 is even.",
            _over_layers(rl, "routing/load_max_over_mean"),
            from_zero=True,
        ),
        Chart(
            "Unused experts",
            "Experts of a layer that no token of the update chose.",
            _over_layers(rl, "routing/unused_experts"),
            from_zero=True,
        ),
        Chart(
            "Routed live during replay",
            "Share of positions whose experts the update could not replay.",
            _series(rl, ("live", "routing/live_fraction")),
            unit="%",
            from_zero=True,
        ),
        HeatMap(
            "Experts changed by the update, by layer",
            "Expert level, the learner before against after.",
            _by_layer(rl, "routing/update_changed"),
            unit="%",
        ),
        HeatMap(
            "Experts engine against learner, by layer",
            "Expert level, with the same weights.",
            _by_layer(rl, "routing/engine_changed"),
            unit="%",
        ),
        HeatMap(
            "Load of the fullest expert, by layer",
            "Over the mean.",
            _by_layer(rl, "routing/load_max_over_mean"),
        ),
    ]


def _by_layer(rl: list[Row], prefix: str) -> list[tuple[str, list[Point]]]:
    """The layers' numbers and values, in the order of the layers."""
    pattern = re.compile(re.escape(prefix) + r"/layer_(\d+)$")
    keys = {int(match[1]): key for row in rl for key in row if (match := pattern.match(key))}
    return [(str(layer), points(rl, key)) for layer, key in sorted(keys.items())]


def _over_layers(rl: list[Row], prefix: str) -> list[Series]:
    """The mean over the layers and the worst of them."""
    by_step: dict[float, list[float]] = {}
    for _, column in _by_layer(rl, prefix):
        for step, value in column:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step.items())
    worst, mean = ([(step, of(values)) for step, values in steps] for of in (max, lambda v: sum(v) / len(v)))
    return [Series("worst layer", worst, smooth=True), Series("mean of the layers", mean, smooth=True)]


def _cost(rl: list[Row]) -> list[Panel]:
    return [
        Chart(
            "Time per step",
            "Seconds per phase, mean over ranks.",
            _phases(rl),
            unit="s",
            stacked=True,
        ),
        Chart(
            "Throughput",
            "Tokens per second of all ranks together, each over its own phase.",
            _series(
                rl,
                ("rollout", "throughput/rollout_tokens_per_second"),
                ("learner", "throughput/learner_tokens_per_second"),
                smooth=True,
            ),
            from_zero=True,
        ),
        Chart(
            "Memory",
            "Resident memory of all ranks together.",
            _series(rl, ("resident", "memory/rss_gib")),
            unit="GiB",
            from_zero=True,
        ),
        *_ledger(rl),
    ]


OWNERS = (
    "policy_weights", "policy_gradients", "policy_optimizer", "reference", "critic", "reward_model", "engine_weights",
    "engine_kv_cache", "sync_buffers", "rest",
)  # fmt: skip


def _ledger(rl: list[Row]) -> list[Bars]:
    """What was where at the end of each phase of the last step."""
    found = memory_ledger(rl)
    titles = {"device": "Device memory by owner", "host": "Host memory by owner"}
    return [
        Bars(
            titles[place],
            "All ranks together, at the end of each phase of the last step; sync buffers: the most during the sync.",
            list(phases.items()),
            order=OWNERS,
            unit="GiB",
        )
        for place, phases in found.items()
    ]


def _phases(rl: list[Row]) -> list[Series]:
    timed = [row for row in rl if any(key.startswith("time/") for key in row)]
    largest = phase_names(timed)
    shown, rest = largest[:7], largest[7:]

    def column(*names: str) -> list[Point]:
        return [(row["step"], sum(_number(row.get(f"time/{name}")) for name in names)) for row in timed]

    out = [Series(name.replace("_", " "), column(name)) for name in shown]
    return [*out, Series("other", column(*rest))] if rest else out


def _sft(sft: list[Row]) -> list[Chart]:
    return [
        Chart(
            "SFT loss",
            "Nats per response token, training and validation.",
            _series(sft, ("training", "sft/loss"), smooth=True) + _series(sft, ("validation", "sft/validation_loss")),
        ),
        Chart("SFT learning rate", "Per step.", _series(sft, ("lr", "sft/lr")), from_zero=True),
        Chart(
            "SFT gradient norm",
            "Before clipping.",
            _series(sft, ("gradient norm", "sft/grad_norm"), smooth=True),
            from_zero=True,
        ),
        Chart("SFT time per step", "Slowest rank.", _series(sft, ("step", "time/step")), unit="s", from_zero=True),
    ]


def _reward_model(rows: list[Row]) -> list[Chart]:
    name = "reward_model"
    return [
        Chart(
            "Preference loss",
            "-log sigmoid of the margin, training and validation; log 2 = 0.69 is a coin.",
            _series(rows, ("training pairs", f"{name}/loss"), smooth=True)
            + _series(rows, ("validation pairs", f"{name}/validation_loss")),
        ),
        Chart(
            "Preference accuracy",
            "Pairs whose chosen side scores higher, training and validation.",
            _series(rows, ("training pairs", f"{name}/accuracy"), smooth=True)
            + _series(rows, ("validation pairs", f"{name}/validation_accuracy")),
            unit="%",
            from_zero=True,
        ),
        Chart(
            "Preference margin",
            "Score of the chosen minus score of the rejected side.",
            _series(rows, ("margin", f"{name}/margin"), smooth=True),
        ),
    ]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
