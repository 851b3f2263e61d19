"""`megarl verify algorithms`: any file of vectors, whatever its cases are called, and no case is passed over."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl.cli import app
from megarl.errors import BadInput
from megarl.verify.algorithms import GOLDEN, compare, render

CONTENT = json.loads(GOLDEN.read_text())


def content() -> dict[str, Any]:
    return json.loads(json.dumps(CONTENT))


def written(path: Path, made: dict[str, Any]) -> Path:
    (path / "vectors.json").write_text(json.dumps(made))
    return path / "vectors.json"


def verify(*args: str) -> int:
    return app(["verify", "algorithms", *args], standalone_mode=False) or 0


def test_the_packaged_vectors_are_compared_whole_and_all_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify() == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {f"{name} {precision}" for name in CONTENT["cases"] for precision in ("float64", "float32")}
    expected |= {f"{name} float64" for name in CONTENT["vector_axes"]}
    assert len(CONTENT["cases"]) == 49 and len(CONTENT["vector_axes"]) == 21
    assert {" ".join(line.split()[:2]) for line in lines[1:-1]} == expected
    assert all(line.endswith(" ok") for line in lines[1:-1])
    assert lines[-1] == "119 comparisons: all within tolerance"


def renamed(made: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every case and vector under a random name, in random order; references to vectors follow."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9))  # noqa: E731
    names = {name: word() for name in made["advantages"]}

    def follow(axes: dict[str, Any]) -> dict[str, Any]:
        for axis in ("advantage", "target"):
            axes[axis] = names.get(axes.get(axis), axes.get(axis))
        if "reward" in axes:
            axes["reward"] = " + ".join(names.get(part, part) for part in axes["reward"].split(" + "))
        return {axis: value for axis, value in axes.items() if value is not None or axis not in ("advantage", "target")}

    def shuffled(items: dict[str, Any]) -> dict[str, Any]:
        return dict(draw.sample(list(items.items()), len(items)))

    made["advantages"] = {names[name]: value for name, value in made["advantages"].items()}
    made["vector_axes"] = shuffled({names[name]: follow(axes) for name, axes in made["vector_axes"].items()})
    made["cases"] = shuffled(
        {
            word(): {key: case[key] for key in ("loss", "grad")} | {"axes": follow(case["axes"])}
            for case in made["cases"].values()
        }
    )
    return {key: made[key] for key in ("inputs", "advantages", "cases", "vector_axes")}


def test_names_and_order_mean_nothing(tmp_path: Path) -> None:
    made = renamed(content(), seed=3)
    assert not set(made["cases"]) & set(CONTENT["cases"]) and len(made["cases"]) == 49
    rows = compare(written(tmp_path, made))
    assert [row for row in rows if not row.ok] == []
    assert {row.name for row in rows} == set(made["cases"]) | set(made["vector_axes"]) and len(rows) == 119


def one(case: str) -> dict[str, Any]:
    """A file with one case of the golden ones and nothing else to compare."""
    made = content()
    return made | {"cases": {"some case": made["cases"][case]}, "vector_axes": {}}


def changed(case: str, **axes: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        made = one(case)
        made["cases"]["some case"]["axes"] |= axes
        return made

    return make


def changed_vector(**axes: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        made = content()
        made["advantages"]["some case"] = made["advantages"]["rloo"]
        return made | {"cases": {}, "vector_axes": {"some case": axes}}

    return make


def without(axis: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        made = one("dapo")
        del made["cases"]["some case"]["axes"][axis]
        return made

    return make


GATES = "none, clip, soft, stop-gradient-weight, log-clip, ratio-mask"
KL_AXIS = {"estimator": "k3", "coef": 0.1, "reference": "logp_ref", "input_clamp": None, "output_clamp": None}
TIS = {"level": "token", "mode": "truncate", "low": 0, "high": 2.0, "renormalise": False}
UNKNOWN = [
    (changed("dapo", ratio="word"), "ratio word is unknown; choose one of: none, token, sequence"),
    (changed("dapo", gate={"type": "bounce"}), f"gate bounce is unknown; choose one of: {GATES}"),
    (changed("dapo", gate={"type": "clip", "low": 0.2, "high": 0.2, "tau": 1}), "no setting tau; it has: low, high, dual"),
    (changed("dapo", gate={"type": "clip", "low": 0.2}), "gate clip needs a value for high"),
    (changed("dapo", gate={"type": "clip", "low": "x", "high": 1}), "gate clip low 'x' is not a number"),
    (changed("dapo", gate={"low": 0.2}), "type"),
    (changed("dapo", aggregate="mean"), "aggregate mean is unknown; choose one of: token-mean"),
    (changed("dapo", ratio_base="new"), "ratio_base new is unknown; choose one of: old, rollout"),
    (changed("dapo", n_seq="some"), "n_seq some is unknown; choose one of: all, valid"),
    (changed("dapo", mask="half"), "mask half is unknown; choose one of: response, drop-truncated, kept-groups"),
    (changed("dapo", advantage="nowhere"), "nowhere is neither in `advantages` nor in `inputs`"),
    (changed("dapo", temperature=1), "axis temperature is unknown; known: advantage, aggregate"),
    (changed("dapo", loss="critic"), "loss critic is unknown; choose one of: policy, value"),
    (changed("dapo", kl=KL_AXIS | {"estimator": "k4"}), "kl estimator k4 is unknown; choose one of: k1, k2, k3, k3+"),
    (changed("dapo", kl=KL_AXIS | {"base": 2}), "kl has no setting base; it has: estimator, coef, reference"),
    (changed("dapo", kl=KL_AXIS | {"reference": "x"}), "x is neither in"),
    (changed("dapo", correction=TIS | {"level": "word"}), "correction level word is unknown; choose one of: token,"),
    (changed("dapo", correction=TIS | {"mode": "fold"}), "correction mode fold is unknown; choose one of: truncate,"),
    (changed("dapo", correction=TIS | {"cap": 3}), "correction has no setting cap; it has: level, mode, low, high"),
    (changed("dapo", fixed_length=None, aggregate="fixed-length"), "needs fixed_length"),
    (changed("dapo", advantage="dynamic_sampling_kept_groups"), "size"),
    (without("kl"), "missing 'kl'"),
    (changed("ppo_value_clip_0.2", gate={"type": "clip"}), "axis gate is unknown; known: aggregate, clip"),
    (changed("ppo_value_clip_0.2", clip=-1), "value clip -1 must be above 0"),
    (changed_vector(estimator="mean"), "advantage mean is unknown; choose one of: group, leave-one-out"),
    (changed_vector(estimator="leave-one-out", scale="std"), "leave-one-out has no setting scale; it has: singleton"),
    (changed_vector(estimator="group", scale="iqr"), "scale 'iqr' is unknown; choose one of: std, none, batch"),
    (changed_vector(estimator="gae", output="values"), "output values is unknown; choose one of: advantages, returns"),
    (changed_vector(estimator="group", output="returns"), "advantage group has no setting output"),
    (changed_vector(filter="easy"), "filter easy is unknown; choose one of: dynamic-sampling"),
    (changed_vector(shaping="short"), "shaping short is unknown; choose one of: soft-overlong"),
    (changed_vector(reward="reward"), "missing 'estimator'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), UNKNOWN, ids=[reason for _, reason in UNKNOWN])
def test_a_case_that_cannot_be_built_is_named_with_the_reason_and_fails(
    make: Callable[[], dict[str, Any]], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("--vectors", str(written(tmp_path, make()))) == 1
    out = capsys.readouterr().out.splitlines()
    assert all(line.startswith("some case") and "cannot be built here: " in line for line in out[1:-1])
    assert out[1:-1] and all(reason in line for line in out[1:-1])
    assert out[-1].endswith(f"comparisons: {len(out) - 2} not")


def test_one_case_that_cannot_be_built_does_not_hide_the_others(tmp_path: Path) -> None:
    made = content() | {"vector_axes": {}}
    made["cases"] = {"a": made["cases"]["dapo"], "b": made["cases"]["grpo_kl_k3"]}
    made["cases"]["a"]["axes"]["ratio"] = "word"
    assert [(row.name, row.ok) for row in compare(written(tmp_path, made))] == [
        ("a", False), ("a", False), ("b", True), ("b", True)
    ]  # fmt: skip


def test_a_difference_is_seen_at_the_tolerance_of_each_precision(tmp_path: Path) -> None:
    made = one("dapo")
    case = made["cases"]["some case"]

    def verdicts() -> list[str]:
        return [line.split()[-1] for line in render(compare(written(tmp_path, made))).splitlines()[1:-1]]

    exact, slope = case["loss"], case["grad"][0][0]
    assert verdicts() == ["ok", "ok"]
    case["loss"] = exact + 3e-12
    assert verdicts() == ["DIFFERS", "ok"]
    case["loss"] = exact + 3e-7
    assert verdicts() == ["DIFFERS", "DIFFERS"]
    case["loss"], case["grad"][0][0] = exact, slope + 3e-12
    assert verdicts() == ["DIFFERS", "ok"]
    case["grad"][0][0] = slope - 3e-7
    assert verdicts() == ["DIFFERS", "DIFFERS"]
    case["grad"][0][0], case["grad"][11][0] = slope, float("nan")
    assert verdicts() == ["DIFFERS", "DIFFERS"]
    case["grad"] = [[0.0]]
    assert verdicts() == ["DIFFERS", "DIFFERS"]


@pytest.mark.parametrize("name", CONTENT["vector_axes"])
def test_a_wrong_vector_is_seen(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = content()
    made |= {"cases": {}, "vector_axes": {name: made["vector_axes"][name]}}
    stored = made["advantages"][name]
    row = stored[0] if isinstance(stored[0], list) else stored
    row[0] += 3e-12
    assert verify("--vectors", str(written(tmp_path, made))) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("DIFFERS")
    made["advantages"][name] = stored[:-1]
    assert [row.ok for row in compare(written(tmp_path, made))] == [False]


def test_a_filter_that_keeps_nothing_agrees_with_an_empty_vector(tmp_path: Path) -> None:
    made = content() | {"cases": {}, "vector_axes": {"kept": {"filter": "dynamic-sampling"}}}
    made["inputs"]["reward"] = [1.0] * len(made["inputs"]["reward"])
    made["advantages"]["kept"] = []
    assert [row.ok for row in compare(written(tmp_path, made))] == [True]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "3", '"x"', "\x00", json.dumps(CONTENT | {"cases": [], "vector_axes": {}}),
     json.dumps(CONTENT | {"vector_axes": None}), json.dumps(CONTENT | {"inputs": {"mask": [1, 2]}}),
     json.dumps(CONTENT | {"inputs": {"mask": [[1], [2, 3]]}}), json.dumps(CONTENT | {"cases": {}, "vector_axes": {}})],
    ids=range(12),
)  # fmt: skip
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput, match="x.json: not a file of vectors .*; give one in") as info:
        compare(tmp_path / "x.json")
    assert "\n" not in str(info.value)


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megarl", "verify", "algorithms"]
    run = lambda *args: subprocess.run([*command, *args], capture_output=True, text=True)  # noqa: E731
    none = run("--vectors", str(tmp_path / "none.json"))
    assert none.returncode == 2 and none.stdout == "" and len(none.stderr.splitlines()) == 1
    assert none.stderr.startswith("error: ") and "none.json: not a file of vectors" in none.stderr
    wrong = one("dapo")
    wrong["cases"]["some case"]["loss"] += 1
    differs = run("--vectors", str(written(tmp_path, wrong)))
    assert differs.returncode == 1 and differs.stdout.count("DIFFERS") == 2 and differs.stderr == ""
    assert "megarl verify algorithms" in run("--help").stdout.split("Example:")[1]


class ByHand:
    """Cases for random inputs, in plain floats from the specification's closed forms; nothing of megarl in here."""

    def __init__(self, seed: int, rows: int = 9, columns: int = 7) -> None:
        draw = np.random.default_rng(seed)
        shape = (rows, columns)
        lengths = draw.integers(0, columns + 1, rows)
        mask = (np.arange(columns) < lengths[:, None]) & (draw.random(shape) < 0.85)
        old = -draw.exponential(0.7, shape)
        self.inputs = {
            "mask": mask.astype(float),
            "group": draw.permutation(np.arange(rows) // 3).astype(float),
            "reward": draw.choice([0.0, 1.0, 0.25], rows),
            "truncated": draw.integers(0, 2, rows).astype(float),
            "logp": old + draw.normal(0, 0.25, shape),
            "logp_old": old,
            "logp_rollout": old + draw.normal(0, 0.3, shape),
            "logp_ref": old + draw.normal(0, 0.4, shape),
            "value_old": draw.normal(0, 1, shape),
            "value_new": draw.normal(0, 1, shape),
            "target": draw.normal(0, 1, shape),
            "token_adv": draw.normal(0, 1, shape),
        }
        x = self.inputs
        self.rows, self.columns = rows, columns
        self.tokens = [[t for t in range(columns) if mask[i, t]] for i in range(rows)]
        self.total = int(mask.sum())
        self.z, self.d, self.kappa = x["logp"] - old, old - x["logp_rollout"], x["logp"] - x["logp_ref"]
        self.advantages = np.zeros(rows)
        for i in range(rows):
            mates = x["reward"][x["group"] == x["group"][i]]
            spread = np.sqrt(((mates - mates.mean()) ** 2).sum() / (len(mates) - 1))
            self.advantages[i] = (x["reward"][i] - mates.mean()) / (spread + 1e-6) if spread > 1e-6 else 0.0

    def file(self) -> dict[str, Any]:
        cases = {
            "q1": self.case(self.grpo, kl={**KL_AXIS, "coef": 0.04}, gate=clip(0.2, 0.2)),
            "q2": self.case(self.gspo, ratio="sequence", gate=clip(0.05, 0.06)),
            "q3": self.case(self.gspo_token, ratio="sequence-token", gate=clip(0.05, 0.06), advantage="token_adv"),
            "q4": self.case(self.sapo, gate={"type": "soft", "tau_pos": 1.5, "tau_neg": 3.0}),
            "q5": self.case(self.cispo, gate={"type": "stop-gradient-weight", "low": 1.0, "high": 0.3}, aggregate="token-mean"),
            "q6": self.case(self.gmpo, ratio="geometric-mean-of-clipped", gate={"type": "log-clip", "low": 0.3, "high": 0.2}),
            "q7": self.case(self.tis, gate=clip(0.2, 0.28), aggregate="token-mean", correction={**TIS, "high": 1.3}),
            "q8": self.case(
                self.mis, gate=clip(0.2, 0.28), aggregate="token-mean",
                correction={**TIS, "level": "sequence-product", "mode": "mask", "low": 0.6, "high": 1.6},
            ),
            "q9": self.case(
                self.minirl, ratio="none", gate={"type": "ratio-mask", "low": 0.2, "high": 0.27},
                aggregate="seq-mean-token-sum", correction={**TIS, "level": "token-current-over-rollout", "high": 1.4},
            ),
        }  # fmt: skip
        value_axes = {"loss": "value", "target": "target", "clip": 0.3, "aggregate": "token-mean", "mask": "response"}
        cases["q0"] = self.summed(self.ppo_value, lambda i: 1 / self.total) | {"axes": value_axes}
        kept = sorted(
            {int(g) for g in self.inputs["group"] if len(set(self.inputs["reward"][self.inputs["group"] == g])) > 1}
        )
        return {
            "inputs": {name: value.tolist() for name, value in self.inputs.items()},
            "advantages": {"v1": self.advantages.tolist(), "v2": self.gae(0.98, 0.9), "v3": kept},
            "vector_axes": {
                "v1": {"estimator": "group", "scale": "std", "ddof": 1, "eps": 1e-6, "reward": "reward"},
                "v2": {"estimator": "gae", "gamma": 0.98, "lam": 0.9, "kl_coef": 0.0, "output": "advantages"},
                "v3": {"filter": "dynamic-sampling"},
            },
            "cases": cases,
        }

    def case(self, token: Callable[[int, int], tuple[float, float]], **axes: Any) -> dict[str, Any]:
        full = {"loss": "policy", "advantage": "v1", "ratio": "token", "ratio_base": "old", "n_seq": "all",
                "aggregate": "seq-mean-token-mean", "fixed_length": None, "mask": "response", "kl": None,
                "correction": None, "veto": None, "off_policy_sequence_mask": None} | axes  # fmt: skip
        weight = {
            "token-mean": lambda i: 1 / self.total,
            "seq-mean-token-mean": lambda i: 1 / (len(self.tokens[i]) * self.rows),
            "seq-mean-token-sum": lambda i: 1 / self.rows,
        }[full["aggregate"]]
        return self.summed(token, weight) | {"axes": full}

    def summed(self, token: Callable, weight: Callable[[int], float]) -> dict[str, Any]:
        loss, grad = 0.0, np.zeros((self.rows, self.columns))
        for i, row in enumerate(self.tokens):
            for t in row:
                value, slope = token(i, t)
                loss, grad[i, t] = loss + weight(i) * value, weight(i) * slope
        return {"loss": loss, "grad": grad.tolist()}

    def mean(self, x: np.ndarray, i: int) -> float:
        return sum(x[i, t] for t in self.tokens[i]) / len(self.tokens[i])

    def clipped(self, a: float, r: float, low: float, high: float) -> tuple[float, float]:
        """-min(A r, A clip(r)) and its derivative times r."""
        assert min(abs(r - 1 + low), abs(r - 1 - high)) > 1e-6, "a bound is too near to compare float32 with"
        if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low):
            return -a * (1 + high if a > 0 else 1 - low), 0.0
        return -a * r, -a * r

    def grpo(self, i: int, t: int) -> tuple[float, float]:
        value, slope = self.clipped(self.advantages[i], np.exp(self.z[i, t]), 0.2, 0.2)
        k = self.kappa[i, t]
        return value + 0.04 * (np.exp(-k) - 1 + k), slope + 0.04 * (1 - np.exp(-k))

    def gspo(self, i: int, t: int) -> tuple[float, float]:
        return self.clipped(self.advantages[i], np.exp(self.mean(self.z, i)), 0.05, 0.06)

    def gspo_token(self, i: int, t: int) -> tuple[float, float]:
        return self.clipped(self.inputs["token_adv"][i, t], np.exp(self.mean(self.z, i)), 0.05, 0.06)

    def sapo(self, i: int, t: int) -> tuple[float, float]:
        a, r = self.advantages[i], np.exp(self.z[i, t])
        tau = 1.5 if a > 0 else 3.0
        p = 1 / (1 + np.exp(-tau * (r - 1)))
        return -a * 4 / tau * p, -a * 4 * p * (1 - p) * r

    def cispo(self, i: int, t: int) -> tuple[float, float]:
        a, w = self.advantages[i], min(np.exp(self.z[i, t]), 1.3)
        return -w * a * self.inputs["logp"][i, t], -w * a

    def gmpo(self, i: int, t: int) -> tuple[float, float]:
        a = self.advantages[i]
        bounded = {u: min(self.z[i, u], 0.2) if a > 0 else max(self.z[i, u], -0.3) for u in self.tokens[i]}
        s = np.exp(sum(bounded.values()) / len(bounded))
        return -a * s, -a * s if bounded[t] == self.z[i, t] else 0.0

    def tis(self, i: int, t: int) -> tuple[float, float]:
        w = min(np.exp(self.d[i, t]), 1.3)
        value, slope = self.clipped(self.advantages[i], np.exp(self.z[i, t]), 0.2, 0.28)
        return w * value, w * slope

    def mis(self, i: int, t: int) -> tuple[float, float]:
        rho = np.exp(self.mean(self.d, i) * len(self.tokens[i]))
        w = rho if 0.6 <= rho <= 1.6 else 0.0
        value, slope = self.clipped(self.advantages[i], np.exp(self.z[i, t]), 0.2, 0.28)
        return w * value, w * slope

    def minirl(self, i: int, t: int) -> tuple[float, float]:
        a, r = self.advantages[i], np.exp(self.z[i, t])
        open_ = not ((a > 0 and r > 1.27) or (a < 0 and r < 0.8))
        w = min(np.exp(self.z[i, t] + self.d[i, t]), 1.4) * open_
        return -w * a * self.inputs["logp"][i, t], -w * a

    def ppo_value(self, i: int, t: int) -> tuple[float, float]:
        v, old, target = (self.inputs[name][i, t] for name in ("value_new", "value_old", "target"))
        near = old + min(max(v - old, -0.3), 0.3)
        outside = (near - target) ** 2 > (v - target) ** 2
        return 0.5 * max((v - target) ** 2, (near - target) ** 2), 0.0 if outside else v - target

    def gae(self, gamma: float, lam: float) -> list[list[float]]:
        out = np.zeros((self.rows, self.columns))
        for i, row in enumerate(self.tokens):
            after, running = 0.0, 0.0
            for t in reversed(row):
                reward = self.inputs["reward"][i] if t == row[-1] else 0.0
                running = reward + gamma * after - self.inputs["value_old"][i, t] + gamma * lam * running
                after, out[i, t] = self.inputs["value_old"][i, t], running
        return out.tolist()


def clip(low: float, high: float) -> dict[str, Any]:
    return {"type": "clip", "low": low, "high": high}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_inputs_against_cases_computed_by_hand(seed: int, tmp_path: Path) -> None:
    made = ByHand(seed).file()
    rows = compare(written(tmp_path, made))
    assert [row for row in rows if not row.ok] == []
    assert len(rows) == 2 * len(made["cases"]) + len(made["vector_axes"]) == 23
    assert all(np.any(np.array(case["grad"]) != 0) for case in made["cases"].values())
