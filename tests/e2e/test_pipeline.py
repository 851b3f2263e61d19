"""sft, train, eval, convert, report and a replay of the rollouts, as a user runs them, and what each leaves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.dist.harness import run_ranks
from tests.e2e.program import STEPS, SUMS, Project, without_clocks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# What training leaves ------------------------------------------------------------------------------------------


def test_every_step_is_logged_once(trained: Project) -> None:
    assert [row["step"] for row in trained.rows("sft/metrics.jsonl")] == list(range(1, 121))
    assert [row["step"] for row in trained.rows()] == list(range(STEPS + 1))  # 0: the evaluation before the first
    assert sorted(p.name for p in (trained.run / "rl" / "rollouts").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)
    ]


def test_supervised_training_lowers_the_loss(trained: Project) -> None:
    rows = trained.rows("sft/metrics.jsonl")
    assert rows[0]["sft/loss"] == pytest.approx(np.log(300), abs=0.3)  # a random model: every token is equally likely
    assert rows[-1]["sft/loss"] < 2


def test_the_engine_has_the_learners_weights_at_every_step(trained: Project) -> None:
    steps = trained.rows()[1:]
    assert all(0 <= row["sync/gap_mean"] <= 1e-5 for row in steps)
    assert all(0 <= row["gap/logprob_mean"] <= 1e-5 for row in steps)


def test_the_ratio_is_exactly_one_before_the_first_update(trained: Project) -> None:
    first, second = trained.rows()[1:3]
    # The warm-up starts at learning rate 0, so that the first step's second part sees unchanged weights as well.
    assert trained.settings()["rl"]["optimizer"]["warmup_steps"] == 2
    assert first["policy/log_ratio_token_max_abs"] == 0.0
    assert first["policy/ratio_min"] == first["policy/ratio_max"] == 1.0
    assert first["policy/clip_frac"] == 0.0
    assert second["policy/log_ratio_token_max_abs"] > 1e-3


def test_rewards_and_gradients_are_those_of_a_run_that_learns_something(trained: Project) -> None:
    steps = trained.rows()[1:]
    assert all(row["reward/failed_fraction"] == 0 for row in steps)
    assert all(0 < row["reward/mean"] < 1 for row in steps)
    assert all(row["policy/grad_norm"] > 0 for row in steps)
    sampled = [json.loads(line) for line in (trained.run / "rl/rollouts/step_000001.jsonl").open()]
    assert len(sampled) == 16 * 4
    assert steps[0]["reward/mean"] == pytest.approx(np.mean([row["shaped_reward"] for row in sampled]), rel=1e-12)
    assert steps[0]["response/length_mean"] == np.mean([len(row["response_ids"]) for row in sampled])


def test_held_out_problems_are_never_trained_on(trained: Project) -> None:
    from megarl.config.schema import DataSource
    from megarl.data.sources import load_rows

    held_out = {r["prompt"] for r in load_rows(
        DataSource(type="reasoning_gym", task="basic_arithmetic", params=SUMS, size=40, seed=99))}  # fmt: skip
    texts = [json.loads(line)["prompt"] for f in (trained.run / "rl/rollouts").iterdir() for line in f.open()]
    assert held_out and texts and not any(text.removesuffix("<|im_end|>") in held_out for text in texts)


def test_summary(trained: Project) -> None:
    summary = json.loads((trained.run / "summary.json").read_text())
    rows, evaluated = trained.rows(), trained.rows("rl/eval.jsonl")
    assert [row["step"] for row in evaluated] == [0, STEPS]
    assert (summary["sft_accuracy"], summary["rl_accuracy"]) == (evaluated[0]["accuracy"], evaluated[1]["accuracy"])
    assert 0 <= summary["sft_accuracy"] <= 1 and 0 <= summary["rl_accuracy"] <= 1
    assert summary["steps"] == STEPS
    assert summary["wall_seconds"] == pytest.approx(
        trained.rows("sft/metrics.jsonl")[-1]["clock/seconds"] + rows[-1]["clock/seconds"]
    )
    assert 0 < summary["logprob_gap_mean"] <= 1e-5 and summary["logprob_gap_mean"] <= summary["logprob_gap_max"] < 1e-3
    assert 1 < summary["rollout_tokens_per_second"] < 1e6 and 1 < summary["learner_tokens_per_second"] < 1e6
    assert 0.5 < summary["peak_rss_gib"] < 8  # two ranks with torch and vLLM
    assert list(summary["memory_gib"]) == ["host"]  # which is the device
    ledger = summary["memory_gib"]["host"]
    assert list(ledger) == ["rollout", "log_probs", "update", "sync"]
    sizes = {name: tensor.nbytes / 2**30 for name, tensor in weights(trained.run / "rl/hf").items()}
    whole = sum(sizes.values())
    held = whole + sum(size for name, size in sizes.items() if ".experts." not in name)  # on both ranks
    assert ledger["update"]["policy_weights"] == pytest.approx(held, rel=0.02)
    assert ledger["update"]["policy_gradients"] == pytest.approx(held, rel=0.02)
    assert ledger["update"]["policy_optimizer"] == pytest.approx(2 * whole, rel=0.02)  # moments, once over the ranks
    assert ledger["rollout"]["policy_gradients"] == ledger["update"]["policy_gradients"]  # a CPU keeps them
    assert ledger["sync"].get("sync_buffers", 0.0) == 0.0  # ranks of one machine read each other's weights in place


def test_report_is_one_file_with_a_sample(trained: Project) -> None:
    page = (trained.run / "report.html").read_text()
    # Everything that a browser would load: attributes and style sheets that name a place outside the file.
    loads = re.findall(r"""(?:src|href|srcset|data|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    loads += re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", page)
    assert not [place for place in map(str, loads) if re.search(r"^\W*(https?:)?//", place)]
    last = [json.loads(line) for line in (trained.run / f"rl/rollouts/step_{STEPS:06d}.jsonl").open()]
    assert any(row["prompt"].split("<|")[0] in page for row in last)
    assert "Host memory by owner (GiB)" in page and "Device memory by owner" not in page


def test_checkpoints_are_kept_as_configured(trained: Project) -> None:
    names = sorted(p.name for p in (trained.run / "rl/checkpoints").iterdir())
    assert names == [f"step_{STEPS - 2:06d}", f"step_{STEPS:06d}"]


# The exports ---------------------------------------------------------------------------------------------------


def test_rl_changed_the_weights(trained: Project) -> None:
    before, after = weights(trained.run / "sft/hf"), weights(trained.run / "rl/hf")
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert [name for name in same if ".experts." not in name] == []
    assert len(same) < sum(".experts." in name for name in before) / 2  # experts that no token was sent to


def test_exports_give_the_learners_log_probs_in_transformers(trained: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = trained.run / "rl/hf"
    assert AutoTokenizer.from_pretrained(hf).chat_template
    rows = [json.loads(line) for line in (trained.run / "rl/rollouts/step_000001.jsonl").open()][:12]
    sequences = [row["prompt_ids"] + row["response_ids"] for row in rows]
    checkpoint = trained.run / f"rl/checkpoints/step_{STEPS:06d}"
    learner = run_ranks("tests.e2e.cases:learner_log_probs", 1, str(trained.config), str(checkpoint), sequences)[0]
    for folder, same in ((hf, True), (trained.run / "sft/hf", False)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        gap = 0.0
        for tokens, mine in zip(sequences, learner, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, :-1].double()
            theirs = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
            gap = max(gap, np.abs(theirs - np.array(mine[1:])).max())
        assert gap < 1e-4 if same else gap > 1e-2


def test_convert_gives_the_export_bit_for_bit(trained: Project, tmp_path: Path) -> None:
    checkpoint = trained.run / f"rl/checkpoints/step_{STEPS:06d}"
    done = trained.megarl("convert", checkpoint, tmp_path / "out", "--to", "hf")
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_weights(tmp_path / "out", trained.run / "rl/hf")


def test_eval_of_the_export_is_the_last_evaluation_of_training(trained: Project) -> None:
    done = trained.megarl("eval", trained.config, "--checkpoint", trained.run / "rl/hf")
    assert (done.returncode, done.stderr) == (0, "")
    mine, last = trained.rows("eval/eval.jsonl")[-1], trained.rows("rl/eval.jsonl")[-1]
    assert (mine["problems"], mine["accuracy"]) == (last["problems"], last["accuracy"])
    assert f"{last['accuracy']:.1%} ({last['problems']} problems)" in done.stdout


# The same again ------------------------------------------------------------------------------------------------


def test_training_on_saved_rollouts_repeats_the_run(trained: Project, branch: Project) -> None:
    done = branch.megarl("train", branch.config, "--from-rollouts", trained.run / "rl/rollouts")
    assert (done.returncode, done.stderr) == (0, "")
    # Exactly: the same numbers in the same order on the same threads; JSON keeps every digit of a float.
    assert [without_clocks(row) for row in branch.rows()] == [without_clocks(row) for row in trained.rows()]
    assert not any("throughput/rollout_tokens_per_second" in row for row in branch.rows())
    assert_same_weights(branch.run / "rl/hf", trained.run / "rl/hf")
    assert not (branch.run / "rl/rollouts").exists()
    (branch.run / "report.html").unlink()
    done = branch.megarl("report", branch.run)
    assert (done.returncode, done.stderr) == (0, "")
    assert (branch.run / "report.html").stat().st_size > 10_000


def test_a_stopped_run_continues_to_the_same_end(trained: Project, branch: Project) -> None:
    with branch.start("train", branch.config) as job:
        job.wait_for(lambda: len(branch.rows()) >= 3)
        job.interrupt()
        code, output, errors = job.end()
    assert code == 130 and len(errors.splitlines()) == 1 and errors.startswith("stopping"), errors
    assert "resume=auto" in output
    assert branch.processes() == []
    stopped = branch.rows()[-1]["step"]
    assert 2 <= stopped < STEPS and not (branch.run / "rl/hf").exists()
    done = branch.megarl("train", branch.config, "resume=auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resumed after step {stopped}" in done.stdout
    assert [without_clocks(row) for row in branch.rows()] == [without_clocks(row) for row in trained.rows()]
    assert_same_weights(branch.run / "rl/hf", trained.run / "rl/hf")
    assert [row["step"] for row in branch.rows("rl/eval.jsonl")] == [0, STEPS]
    assert (branch.run / "summary.json").exists()


def test_supervised_training_ends_at_its_loss_and_stays_ended(branch: Project) -> None:
    shutil.rmtree(branch.run / "sft")
    done = branch.megarl("sft", branch.config, "sft.stop_at_loss=4.5")
    assert (done.returncode, done.stderr) == (0, "")
    losses = [row["sft/loss"] for row in branch.rows("sft/metrics.jsonl")]
    assert np.mean(losses[-10:]) < 4.5 <= np.mean(losses[-11:-1])
    assert f"ends after step {len(losses)} of at most 120" in done.stdout
    (branch.run / "sft" / "hf" / "model.safetensors").unlink()
    done = branch.megarl("sft", branch.config, "sft.stop_at_loss=4.5", "resume=auto")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(branch.rows("sft/metrics.jsonl")) == len(losses)
    assert (branch.run / "sft" / "hf" / "model.safetensors").exists()
