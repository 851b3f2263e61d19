"""Every preset trains end to end: real learner, real engine, two ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from megarl.algorithms import PRESETS
from tests.dist.harness import run_ranks
from tests.e2e.program import Project, without_clocks

STEPS = 5
BAND = ["rl.algorithm.gate.low=0.01", "rl.algorithm.gate.high=0.013"]  # GSPO's, for responses of three tokens
OWN = {"gspo": BAND, "gspo_token": BAND, "ppo": ["rl.critic.optimizer.lr=1e-3"]}
EVERY = [
    "reward/score", "reward/mean", "response/length_mean", "response/truncated_fraction", "groups/zero_std_fraction",
    "groups/all_wrong_fraction", "groups/sampled", "groups/trained_without_signal_fraction", "policy/loss",
    "policy/grad_norm", "policy/entropy", "policy/ratio_mean", "policy/ratio_min", "policy/ratio_max",
    "policy/ratio_p99", "policy/log_ratio_token_std", "policy/log_ratio_seq_std", "policy/log_ratio_within_seq_var",
    "policy/kl_old_k1", "policy/kl_old_k3", "policy/zero_grad_frac", "gap/logprob_mean", "sync/gap_mean",
    "memory/peak_rss_gib", "time/update", "time/step",
]  # fmt: skip
BY_SIGN = ["policy/gate_mean_pos", "policy/gate_mean_neg"]
BESIDE = {
    "clip": ["policy/clip_high_frac", "policy/clip_low_frac", "policy/clip_seq_frac"],
    "soft": ["policy/gate_mean_pos", "policy/gate_mean_neg", "policy/gate_min", "policy/gate_half_closed_frac"],
    "reference": ["policy/kl_ref"],
    "old": ["mismatch/rho_mean", "mismatch/ess", "mismatch/kept_frac", "mismatch/kl_k1", "mismatch/kl_k3"],
    "critic": [
        "critic/loss",
        "critic/explained_variance",
        "critic/grad_norm",
        "critic/clip_frac",
        "critic/return_mean",
    ],
}


@pytest.fixture(scope="module")
def ranks(warm: Project, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    project = Project.create(tmp_path_factory.mktemp("presets"), model=warm.model)
    settings = yaml.safe_load(project.config.read_text())
    settings |= {"eval": {"data": []}, "log": {"tensorboard": False, "rollouts_every": 0}, "checkpoint": {"every": 0}}
    settings["rl"] |= {"steps": STEPS, "init_from": "model", "prompts_per_step": 8}
    settings["rl"]["algorithm"] = {}
    settings["rl"]["optimizer"]["lr"] = 2e-4
    settings["model"] = {"path": str(warm.run / "sft" / "hf")}
    project.config.write_text(yaml.safe_dump(settings))
    presets = {name: OWN.get(name, []) for name in PRESETS}
    what = str(project.config), presets, ["ppo", "dapo"], "ppo"
    return run_ranks("tests.e2e.cases:train_presets", 2, *what, timeout=290)


@pytest.fixture(scope="module")
def rows(ranks) -> dict[str, list[dict[str, float]]]:
    return ranks[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_it_trains(rows, preset):
    own, algorithm = rows[preset], PRESETS[preset]
    assert [row["step"] for row in own] == [1, 2, 3, 4, 5]
    names = [*EVERY, *BESIDE.get(algorithm.gate.type, [])]
    names += BESIDE["reference"] if algorithm.needs_reference else []
    names += BESIDE["old"]
    names += BESIDE["critic"] if algorithm.value is not None else []
    for row in own:
        # the gate by the sign of the advantage: of a step whose groups all lack a signal there is none
        silent = BY_SIGN if row["groups/trained_without_signal_fraction"] == 1.0 else []
        assert [name for name in names if name not in silent and not math.isfinite(row.get(name, math.nan))] == []
        assert row["policy/grad_norm"] > 0 or row["groups/trained_without_signal_fraction"] == 1.0
        assert row["sync/gap_mean"] <= 1e-5
    if algorithm.gate.type != "none":
        assert any(row["policy/ratio_max"] > 1.0001 for row in own)  # the second optimizer step is off policy


def test_dapo_trains_on_groups_with_a_signal_only(rows):
    assert {row["groups/trained_without_signal_fraction"] for row in rows["dapo"]} == {0.0}
    assert any(row["groups/kept"] < row["groups/sampled"] for row in rows["dapo"])
    assert any(row["groups/trained_without_signal_fraction"] > 0 for row in rows["grpo"])


@pytest.mark.parametrize("preset", ["ppo", "dapo"])  # a critic with its optimizer; groups carried over between steps
def test_a_run_continues_to_the_same_end(rows, preset):
    plain, resumed = ([without_clocks(row) for row in rows[name]] for name in (preset, f"{preset} resumed"))
    assert resumed == plain


def test_a_learner_that_leaves_the_device_computes_the_same(rows):
    """With a critic and a reference, stopped and resumed: every number of every step but clocks and memory."""
    assert [without_clocks(row) for row in rows["ppo parked"]] == [without_clocks(row) for row in rows["ppo"]]


def test_what_is_parked_is_not_where_it_is_computed_with(ranks):
    owners = [f"{model} {owner}" for model in ("policy", "critic") for owner in ("weights", "gradients", "optimizer")]
    for rank in ranks:
        found = rank["in place"]
        assert found["rollout"] == found["sync"] == dict.fromkeys(owners, 0)
        assert all(found["update"].values()) and found["update"].keys() == set(owners)
        for phase in ("reference", "log_probs"):
            assert {name: size for name, size in found[phase].items() if size} == {
                name: size for name, size in found["update"].items() if "weights" in name
            }


def test_the_ledger_knows_every_owner(rows):
    """GiB of both ranks: moments are twice the weights, gradients once, and an engine has the policy's weights."""
    for name in ("ppo", "ppo parked"):
        row, gib = rows[name][-1], 2**30
        host = {phase: {} for phase in ("rollout", "reference", "log_probs", "update", "sync")}
        for key, value in row.items():
            if key.startswith("memory/host/"):
                phase, owner = key.split("/")[2:]
                host[phase][owner] = value
        assert not any(key.startswith("memory/device/") for key in row)
        update, rollout = host["update"], host["rollout"]
        assert update["policy_gradients"] == pytest.approx(update["policy_weights"], rel=0.02)  # padding
        # with two ranks each has half of the dense moments, and all of its experts'
        assert update["policy_weights"] < update["policy_optimizer"] < 2.02 * update["policy_weights"]
        assert rollout["reference"] == pytest.approx(update["policy_weights"], rel=0.02)
        assert rollout["engine_weights"] > 0 and rollout["engine_kv_cache"] > 0
        for phase in ("rollout", "reference", "log_probs", "sync"):
            there = update["policy_gradients"] if name == "ppo" else 0.0  # by default a CPU keeps them
            assert host[phase].get("policy_gradients", 0.0) == there
            gone = update["policy_gradients"] - there  # a critic has a scalar head in place of the output layer
            assert 0.8 * gone <= update["critic"] - host[phase]["critic"] <= gone
        for phase in host.values():
            assert sum(v for owner, v in phase.items() if owner != "rss") == pytest.approx(phase["rss"], abs=1 / gib)


def test_dapo_carries_its_surplus_over(rows):
    # in which step depends on the rounding of the machine's products
    assert any(row["groups/carried_over"] > 0 for row in rows["dapo"])


def test_the_critic_learns(rows):
    losses = [row["critic/loss"] for row in rows["ppo"]]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_a_number_stops_every_rank_and_keeps_the_micro_batches(ranks):
    for number, rank in enumerate(ranks):
        ended = rank["nan"]
        assert "gradient norm is nan" in ended["said"] and ended["kept"] in ended["said"]
        assert ended["unchanged"] and ended["kept"].endswith(f"rank{number}.safetensors")
        assert ended["tokens"] > 0 and ended["replayed"]  # with the loss as it should be, the same step goes through


def test_an_alarm_before_the_update_leaves_the_weights_as_they_are(rows):
    own = rows["left out"]
    assert [row["alarms/skipped_updates"] for row in own] == [0, 0, 1]
    assert ["policy/loss" in row for row in own] == [True, True, False]
    assert own[2]["routing/update_changed"] == 0 and own[2]["sync/gap_mean"] <= 1e-5
    assert own[2]["alarms/length"] == 1


@pytest.mark.parametrize(
    "broken, named",
    [
        ("swapped", "experts.gate_proj/up_proj/down_proj in layer 1 (experts 2, 5)"),
        ("skipped", "self_attn.o_proj in layer 0"),
    ],
)
def test_a_broken_weight_sync_stops_the_run_and_names_the_tensors(ranks, broken, named):
    for rank in ranks:
        assert rank[broken].startswith("weight sync: learner and engine log-probs differ")
        assert rank[broken].endswith(f"these tensors differ: {named}")
