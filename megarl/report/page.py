"""The report as one HTML file: everything that comes from a run is escaped, nothing is loaded from anywhere."""

from __future__ import annotations

import datetime
import json
from html import escape
from pathlib import Path
from typing import Any

from megarl.report.charts import show
from megarl.report.data import Row, RunData, figures, mean_of, phase_names
from megarl.report.panels import sections
from megarl.report.style import CSS, SCRIPT

LONGEST_TEXT = 4_000  # characters of a prompt or response that are shown
EXAMPLES = 2  # right ones and wrong ones, per recorded step
RIGHT = 0.99  # a score from here on counts as right

LABELS = {  # figure of the summary -> (label, unit)
    "sft_accuracy": ("Held-out accuracy before RL", "%"),
    "rl_accuracy": ("Held-out accuracy after RL", "%"),
    "steps": ("RL steps", ""),
    "wall_seconds": ("Wall time", "s"),
    "rollout_tokens_per_second": ("Rollout tokens per second", ""),
    "learner_tokens_per_second": ("Learner tokens per second", ""),
    "logprob_gap_mean": ("Learner/engine log-prob gap, mean", ""),
    "logprob_gap_max": ("Learner/engine log-prob gap, max", ""),
    "experts_changed_update": ("Experts changed by a step's update", "%"),
    "experts_changed_engine": ("Experts chosen differently by the engine", "%"),
    "peak_rss_gib": ("Peak memory of all ranks", "GiB"),
}


def page(data: RunData) -> str:
    """The whole document."""
    drawn = sections(data)
    samples = _samples(data)
    parts = [(anchor, heading, f'<div class="charts">{body}</div>') for anchor, heading, body in drawn]
    parts += [("samples", "Sample responses", samples)] if samples else []
    parts += [("figures", "Figures", _figures(data))]
    name = data.run_dir.resolve().name
    return document(f"{name} report", _header(data, escape(name)), parts, data.run_dir)


def document(title: str, header: str, parts: list[tuple[str, str, str]], source: Path) -> str:
    """A page of `parts` (anchor, heading, HTML) below a header (HTML), with the style and the script of all reports."""
    nav = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in parts)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{html}</section>' for anchor, heading, html in parts
    )
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · megarl</title><style>{CSS}</style></head><body>"
        f'<header class="top">{header}<nav>{nav}</nav></header><main>{body}</main>'
        f"<footer>Written by megarl on {written} from {escape(str(source))}.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _header(data: RunData, name: str) -> str:
    done = data.rl[-1]["step"] if data.rl else 0
    planned = data.planned_steps
    if data.finished:
        state, notice = '<span class="state done">finished</span>', ""
    else:
        state = '<span class="state stopped">not finished</span>'
        of = f" of {planned}" if planned else ""
        notice = (
            f'<p class="notice">This run has no summary yet: it is still going on or was interrupted, after {done}{of} '
            "RL steps. Figures below are taken from its metrics so far.</p>"
        )
    facts = "".join(f"<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>" for term, fact in _facts(data))
    return (
        f'<div class="name"><h1>{name}</h1>{state}</div><dl class="facts">{facts}</dl>{notice}'
        f'<div class="tiles">{_tiles(data)}</div>'
    )


def _facts(data: RunData) -> list[tuple[str, str]]:
    config, facts = data.config, []
    if model := config.get("model"):
        facts.append(("Model", _model(model)))
    if rl := config.get("rl"):
        facts.append(("Algorithm", _algorithm(rl)))
        facts.append(("Batch", _batch(rl)))
    if parallel := config.get("parallel"):
        degrees = ("tp", "pp", "vpp", "cp", "ep", "etp")
        shape = ", ".join(f"{d} {parallel[d]}" for d in degrees if parallel.get(d) not in (None, 1))
        ranks = data.summary.get("world_size") or parallel.get("nproc")
        facts.append(("Layout", "; ".join(filter(None, [f"{ranks} ranks" if ranks else "", shape or "data parallel"]))))
    machine = data.summary.get("machine")
    if isinstance(machine, dict):
        facts.append(("Machine", ", ".join(str(value) for value in machine.values())))
    elif machine:
        facts.append(("Machine", str(machine)))
    return facts


def _model(model: dict[str, Any]) -> str:
    described = _hf_shape(Path(model["path"]) / "config.json") or _generated_shape(model.get("generate"))
    return ", ".join(filter(None, [str(model["path"]), described, str(model.get("dtype") or "")]))


def _hf_shape(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return ""
    shape = f"{found.get('model_type')}, hidden {found.get('hidden_size')}, {found.get('num_hidden_layers')} layers"
    experts = found.get("num_experts")
    return f"{shape}, {experts} experts top-{found.get('num_experts_per_tok')}" if experts else shape


def _generated_shape(shape: dict[str, Any] | None) -> str:
    if not shape:
        return ""
    moe = "moe" in str(shape.get("family"))
    experts = f", {shape.get('num_experts')} experts top-{shape.get('top_k')}" if moe else ""
    return f"{shape.get('family')}, hidden {shape.get('hidden_size')}, {shape.get('num_layers')} layers{experts}"


def _algorithm(rl: dict[str, Any]) -> str:
    chosen = rl.get("algorithm") or {}
    axes = [str(chosen.get("preset", "gspo")).upper()]
    for axis in ("advantage", "ratio", "gate", "aggregate", "kl", "filter", "shaping", "value", "correction"):
        value = chosen.get(axis)
        if isinstance(value, dict):
            given = {k: v for k, v in value.items() if v is not None and v != ""}
            kind = given.pop("type", given.pop("estimator", ""))
            value = f"{kind} ({', '.join(f'{k} {v}' for k, v in given.items())})" if given else kind
        if value is not None and value != "":
            axes.append(f"{axis} {value}")
    lr = (rl.get("optimizer") or {}).get("lr")
    return "; ".join(axes + ([f"lr {lr:g}"] if isinstance(lr, int | float) else []))


def _batch(rl: dict[str, Any]) -> str:
    prompts, samples, updates = (
        rl.get(key) for key in ("prompts_per_step", "samples_per_prompt", "optimizer_steps_per_rollout")
    )
    return f"{prompts} prompts x {samples} samples a step, {updates} optimizer steps per rollout"


def _tiles(data: RunData) -> str:
    found = figures(data)
    tiles = []
    before, after = found.get("sft_accuracy"), found.get("rl_accuracy")
    if before is not None and after is not None:
        change = (after - before) * 100
        sign = f'<span class="{"up" if change >= 0 else "down"}">{change:+.1f} points</span>'
        tiles.append(("Held-out accuracy", show(after, "%"), f"from {show(before, '%')}, {sign}"))
    elif before is not None or after is not None:
        known, when = (before, "before RL") if after is None else (after, "after RL")
        tiles.append(("Held-out accuracy", show(known, "%"), when))
    if "steps" in found:
        wall = found.get("wall_seconds")
        tiles.append(("RL steps", f"{found['steps']:,}", f"in {_clock(wall)}" if wall else ""))
    if step := mean_of(data.rl, "time/step"):
        largest = phase_names(data.rl)[:1]
        shares = [(name, (mean_of(data.rl, f"time/{name}") or 0) / step) for name in largest]
        more = "".join(f"{escape(name.replace('_', ' '))} takes {share:.0%}" for name, share in shares)
        tiles.append(("Time per step", f"{step:.2f} s", more))
    if "rollout_tokens_per_second" in found:
        learner = found.get("learner_tokens_per_second")
        more = f"learner {learner:,.0f}" if learner else ""
        tiles.append(("Rollout tokens/s", f"{found['rollout_tokens_per_second']:,.0f}", more))
    if "logprob_gap_mean" in found:
        gap_max = found.get("logprob_gap_max")
        more = f"largest {show(gap_max)}" if gap_max is not None else ""
        tiles.append(("Learner/engine gap", show(found["logprob_gap_mean"]), more))
    if "peak_rss_gib" in found:
        tiles.append(("Peak memory", f"{found['peak_rss_gib']:.2f} GiB", "all ranks"))
    return "".join(
        f'<div class="tile"><div class="label">{label}</div><div class="value">{value}</div>'
        f'<div class="more">{more}</div></div>'
        for label, value, more in tiles
    )


def _samples(data: RunData) -> str:
    out = []
    for step, rows in data.rollouts:
        right = [row for row in rows if _score(row) >= RIGHT][:EXAMPLES]
        wrong = [row for row in rows if _score(row) < RIGHT][:EXAMPLES]
        out += [_sample(step, row) for row in right + wrong]
    return f'<div class="samples">{"".join(out)}</div>' if out else ""


def _score(row: Row) -> float:
    score = row.get("score")
    return float(score) if isinstance(score, int | float) else 0.0


def _sample(step: int, row: Row) -> str:
    right = _score(row) >= RIGHT
    facts = [f"step {step}", f"score {show(_score(row))}"]
    reward = row.get("shaped_reward")
    if isinstance(reward, int | float) and reward != row.get("score"):
        facts.append(f"reward {show(reward)}")
    if row.get("response_ids"):
        facts.append(f"{len(row['response_ids'])} tokens")
    if row.get("finish_reason"):
        facts.append(f"finish: {row['finish_reason']}")
    texts = [("Prompt", row.get("prompt")), ("Response", row.get("response")), ("Expected", row.get("answer"))]
    body = "".join(
        f'<div class="role">{role}</div><pre>{_shown(text)}</pre>' for role, text in texts if text is not None
    )
    verdict = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
    return f'<article class="card"><header>{verdict}<span>{escape(" · ".join(facts))}</span></header>{body}</article>'


def _shown(text: Any) -> str:
    text = str(text)
    cut = f"\n… {len(text) - LONGEST_TEXT:,} more characters" if len(text) > LONGEST_TEXT else ""
    return escape(text[:LONGEST_TEXT]) + cut or " "


def _figures(data: RunData) -> str:
    rows = []
    for name, value in figures(data).items():
        if isinstance(value, dict | list) or value is None:
            continue
        label, unit = LABELS.get(name, (name.replace("_", " "), ""))
        exact = show(value, unit) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        rows.append(f'<tr><td>{escape(label)}</td><td class="number">{escape(exact)}</td></tr>')
    summary = f'<table><tr><th>Figure</th><th class="number">Value</th></tr>{"".join(rows)}</table>' if rows else ""
    tables = "".join(f'<div class="card scroll">{table}</div>' for table in (summary, _phase_table(data.rl)) if table)
    config = ""
    if data.config_text:
        config = f"<details><summary>config.yaml</summary><pre>{escape(data.config_text)}</pre></details>"
    return f'<div class="two">{tables}</div>{config}'


def _phase_table(rl: list[Row]) -> str:
    step = mean_of(rl, "time/step")
    if not step:
        return ""
    totals = [(name, sum(float(row.get(f"time/{name}") or 0) for row in rl)) for name in phase_names(rl)]
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="number">{total:.1f}</td>'
        f'<td class="number">{total / len(rl):.3f}</td><td class="number">{total / len(rl) / step:.1%}</td></tr>'
        for name, total in totals
    )
    return (
        '<table><tr><th>Phase</th><th class="number">Total s</th><th class="number">s per step</th>'
        f'<th class="number">Share</th></tr>{rows}</table>'
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
