"""Critic and reward model: the values, gradients and weights of one process in any layout, and those of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn
from tests.dist.learner_cases import fixed_batch
from tests.dist.scalar_cases import OPTIMIZER, STEPS, score_loss, train_all, value_loss

CASES = "tests.dist.scalar_cases"
LAYOUTS = {  # number of ranks -> (model, role, layout, tokens a micro-batch)
    2: [
        ("moe", "critic", dict(), 90),
        ("moe", "critic", dict(tp=2), 400),
        ("moe", "critic", dict(pp=2), 60),
        ("moe", "critic", dict(ep=2), 90),
        ("moe", "reward", dict(tp=2), 400),
        ("moe", "reward", dict(pp=2), 60),
        ("tied", "critic", dict(pp=2), 60),  # the head shares nothing with the embedding of the first stage
    ],
    4: [("moe", "critic", dict(tp=2, pp=2, ep=2), 60), ("moe", "reward", dict(tp=2, pp=2, ep=2), 60)],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("scalar")
    make(root / "moe")
    make(root / "tied", "qwen3", tie_word_embeddings=True)
    return root


@pytest.fixture(scope="module")
def single(checkpoints, tmp_path_factory):
    """(model, role) -> what this process alone found, and the folder of its checkpoints, which every layout reads."""
    saved = str(tmp_path_factory.mktemp("saved"))
    keys = [("moe", "critic"), ("moe", "reward"), ("tied", "critic")]
    results = train_all([(str(checkpoints / name), role, {}, 400) for name, role in keys], saved)
    dist.destroy_process_group()
    return dict(zip(keys, results, strict=True)), saved


def ranks(nproc, checkpoints, saved, **more):
    cases = [(str(checkpoints / name), *rest) for name, *rest in LAYOUTS[nproc]]
    return run_in_turn(CASES, nproc, {"layouts": ("train_all", dict(cases=cases, folder=saved))} | more)


@pytest.fixture(scope="module")
def two(checkpoints, single):
    critic = ("critic_on_a_fixed_batch", dict(path=str(checkpoints / "moe")))
    return ranks(2, checkpoints, single[1], critic=critic)


@pytest.mark.slow  # all three degrees at once: test_learner.py has them for the same model with a language model's head
def test_four_ranks_change_nothing(checkpoints, single):
    assert_nothing_changed(4, ranks(4, checkpoints, single[1])["layouts"], single[0])


def test_layout_changes_nothing(two, single):
    assert_nothing_changed(2, two["layouts"], single[0])


def assert_nothing_changed(nproc, found, alone):
    for rank in found:
        for where, mine in zip(LAYOUTS[nproc], rank, strict=True):
            expected = alone[where[:2]]
            *trained, loaded = mine["outputs"]
            assert loaded == pytest.approx(expected["outputs"][-1], rel=1e-5, abs=1e-6), where
            for outputs, wanted in zip(trained, expected["outputs"], strict=True):
                assert outputs == pytest.approx(wanted, rel=1e-4, abs=1e-5), where
            for step, wanted in zip(mine["steps"], expected["steps"], strict=True):
                assert step == pytest.approx(wanted, rel=2e-5), where
            assert mine["validated"] == pytest.approx(expected["validated"], rel=2e-5), where
            assert mine["head"] == pytest.approx(expected["head"], rel=1e-3, abs=1e-6), where


@pytest.mark.parametrize("role", ["critic", "reward"])
def test_numbers_are_those_of_transformers(checkpoints, single, role):
    """Independent source: hidden states of transformers, a linear head, gradients of torch, AdamW of torch."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoints / "moe", dtype=torch.float32, attn_implementation="eager")
    head = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    batch, mine = fixed_batch(), single[0]["moe", role]
    parameters = [*model.parameters(), head.weight]
    decay, plain = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )

    def forward():
        states = [head(model(batch.select([s]).tokens[None]).last_hidden_state[0])[:, 0] for s in range(len(batch))]
        if role == "reward":
            return torch.stack([one[-1] for one in states])
        return torch.cat([torch.cat([torch.zeros(1), one[:-1]]) for one in states])  # the state before each token

    def known(out):
        return out.tolist() if role == "reward" else out[batch.response_mask > 0].tolist()

    outputs, steps = [known(forward().detach())], []
    for _ in range(STEPS):
        adam.zero_grad()
        out = forward()
        loss, _metrics = (score_loss if role == "reward" else value_loss)(batch, out, None)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        steps.append([loss.item(), norm.item()])
        outputs.append(known(forward().detach()))
    assert max(map(abs, mine["outputs"][0])) == 0.0  # a fresh head says 0
    assert max(map(abs, mine["outputs"][-1])) > 0.05
    for got, expected in zip(mine["outputs"], outputs, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for got, expected in zip(mine["steps"], steps, strict=True):
        assert [got[0], got[2]] == pytest.approx(expected, rel=5e-5)


def test_the_critic_lowers_its_value_loss_on_a_fixed_batch(two):
    first, second = two["critic"]
    assert first == second
    assert first[-1] < 0.25 * first[0]
