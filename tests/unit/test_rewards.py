"""The built-in verifiers and the checks of a reward configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megarl.config.schema import Reward
from megarl.errors import BadInput
from megarl.rewards import RewardRunner, check_reward, parts, required_field, verifiers
from megarl.rewards.functions import build
from megarl.rewards.tasks import create_dataset
from megarl.types import Prompt


@pytest.mark.parametrize(
    ("kind", "params", "response", "answer", "score"),
    [
        ("exact_match", {}, " 42\n", "42", 1),
        ("exact_match", {}, "042", "42", 0),
        ("exact_match", {"numeric": True}, "042.0", "42", 1),
        ("exact_match", {"numeric": True}, "1,000", "1000", 1),
        ("exact_match", {"numeric": True}, "NaN", "NaN", 0),
        ("exact_match", {"ignore_case": True}, "Paris", "PARIS", 1),
        ("exact_match", {}, "Paris", "PARIS", 0),
        ("regex", {"pattern": r"#### (-?\d+)"}, "so 3 #### 4 no #### -5.", "-5", 1),
        ("regex", {"pattern": r"#### (-?\d+)", "which": "first"}, "so 3 #### 4 no #### -5.", "-5", 0),
        ("regex", {"pattern": r"\d+"}, "7 then 8", "8", 1),
        ("regex", {"pattern": r"\d+"}, "none", "8", 0),
        ("regex", {"pattern": "answer: (.*?)$", "flags": "im"}, "x\nAnswer: yes\nz", "yes", 1),
        ("math_verify", {}, r"thus \boxed{\frac{1}{2}}", "0.5", 1),
        ("math_verify", {}, "$x = 3$", r"\frac{6}{2}", 1),
        ("math_verify", {}, r"\boxed{\frac{1}{3}}", "0.5", 0),
        ("math_verify", {}, "no idea", "0.5", 0),
    ],
)
def test_verifiers(kind, params, response, answer, score):
    assert float(build(kind, params)("", response, answer, source_index=3)) == score


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "countdown"])
def test_reasoning_gym_reward_is_the_data_sets_own_scorer(task):
    data = create_dataset(task, size=8, seed=4)
    reward = build("reasoning_gym", {})
    strict = build("reasoning_gym", {"partial": False})
    for entry in data:
        answer = str(entry["answer"] or entry["metadata"].get("expression", ""))
        for response in (answer, "12", f"it is {answer}", ""):
            own = data.score_answer(response, entry)
            assert reward("", response, None, entry=entry) == pytest.approx(own)
            assert strict("", response, None, entry=entry) == float(own >= 1)
        tagged = f"17 <answer>3</answer> hm <answer> {answer}\n</answer> 9"
        assert reward("", tagged, None, entry=entry) == data.score_answer(answer, entry)


def test_one_task_is_imported_without_the_whole_package_and_the_rest_stays_reachable():
    code = (
        "import sys; from megarl.rewards.tasks import create_dataset as c; d = c('chain_sum', size=3, seed=1);"
        "assert 'matplotlib' not in sys.modules and 'sympy' not in sys.modules and 'torch' not in sys.modules;"
        "import reasoning_gym; full = reasoning_gym.create_dataset('chain_sum', size=3, seed=1);"
        "assert 'matplotlib' in sys.modules and list(full) == list(d) and type(full) is type(d);"
        "print(full.score_answer('1', d[0]) == d.score_answer('1', d[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


PARTS = {"type": "weighted", "named": {"a": {}, "mean": {}}}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"type": "exactmatch"}, r"reward.type: 'exactmatch'; set one of exact_match, regex, .*module:function"),
        ({"type": "regex"}, r"reward.params: \{\} does not fit regex: .*'pattern'"),
        ({"type": "exact_match", "params": {"case": 1}}, r"reward.params: .*'case'"),
        ({"type": "http", "params": {"adress": "x"}}, "reward.params: .*'url'"),
        ({"type": "my rewards:score"}, "set module:function"),
        ({"named": {"a": {"type": "nope"}}}, r"reward.named.a.type: 'nope'"),
        ({"named": {"a": {"named": {"b": {}}}}}, r"reward.named.a.named: \['b'\]; move"),
        ({"type": "model"}, r"reward.params: \{\} does not fit model; set path"),
        ({"type": "model", "params": {"path": "x", "scale": 2}}, "'scale': 2.* does not fit model"),
        ({"named": {"q": {"type": "model", "params": {"path": 3}}}}, "reward.named.q.params: .*does not fit model"),
        ({"type": "weighted"}, r"reward.params: \{\} does not fit weighted; set weights"),
        ({"type": "weighted", "params": {"weights": {}}}, "does not fit weighted; set weights"),
        ({"type": "weighted", "params": {"weights": {"a": 1}}}, r"weights: 'a' is not in reward.named \(none are"),
        (PARTS | {"params": {"weights": {"a": 1, "c": 1}}}, r"weights: 'c' is not in reward.named \(a, mean\)"),
        (PARTS | {"params": {"weights": {"a": "much"}}}, r"reward.params.weights.a: 'much'; set a number"),
        (PARTS | {"params": {"weights": {"a": float("nan")}}}, "weights.a: nan; set a number"),
        (PARTS | {"params": {"weights": {"mean": 1}}}, "reward.named.mean: .*another name"),
        ({"named": {"w": {"type": "weighted"}}}, "reward.named.w.type: 'weighted'; only reward.type"),
    ],
)
def test_check_reward_names_the_key(reward, message):
    with pytest.raises(BadInput, match=message):
        check_reward(Reward(**reward))


def test_construction_refuses_what_cannot_be_built():
    cases = {
        "not_a_module:score": "reward.type: not_a_module:score cannot be built.*ModuleNotFoundError",
        "json:no_such_function": "AttributeError",
    }
    for kind, message in cases.items():
        with pytest.raises(BadInput, match=message):
            RewardRunner(Reward(type=kind))
    with pytest.raises(BadInput, match="reward.named.r.type: regex cannot be built.*PatternError|error: "):
        RewardRunner(Reward(named={"r": Reward(type="regex", params={"pattern": "("})}))
    with pytest.raises(BadInput, match="url is 'ftp://x'; set an http"):
        RewardRunner(Reward(type="http", params={"url": "ftp://x"}))


def test_required_field_follows_the_rows_reward():
    reward = Reward(type="reasoning_gym", named={"judge": Reward(type="http"), "same": Reward(type="exact_match")})
    assert [required_field(reward, name) for name in (None, "judge", "same")] == [("entry",), (), ("answer",)]
    with pytest.raises(BadInput, match=r"reward 'other' is not in reward.named \(judge, same\)"):
        required_field(reward, "other")


def test_a_weighted_reward_needs_what_its_parts_need():
    named = {
        "right": Reward(type="reasoning_gym"),
        "same": Reward(),
        "again": Reward(),
        "quality": Reward(type="model", params={"path": "x"}),
        "unused": Reward(type="http"),
    }
    reward = Reward(
        type="weighted", params={"weights": {"right": 1, "same": 0.5, "again": -1, "quality": 2}}, named=named
    )
    assert parts(reward, None) == {"right": 1.0, "same": 0.5, "again": -1.0, "quality": 2.0}
    assert parts(reward, "same") == {"same": 1.0}
    assert required_field(reward) == ("entry", "answer") and required_field(reward, "quality") == ()
    assert set(verifiers(reward)) == {"right", "same", "again", "unused"}


def test_without_a_verifier_no_process_starts_and_asking_for_one_is_refused():
    reward = Reward(type="model", params={"path": "x"})
    with RewardRunner(reward) as runner:
        assert runner._workers == [] and runner.score([]) == []
        with pytest.raises(BadInput, match="reward of the config is no verifier"):
            runner.score([(Prompt("p", (1,), None), "x")])
