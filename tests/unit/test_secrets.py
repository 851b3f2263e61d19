"""Secrets: by reference in a configuration, in no file and no message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarl.config import dump_config, load_config
from megarl.config.schema import Reward
from megarl.errors import BadInput
from megarl.rewards import RewardRunner
from megarl.secrets import masked, without_secrets

URL = "http://127.0.0.1:9/score"


def config(folder: Path, **params: object) -> Path:
    file = folder / "project.yaml"
    reward = {"type": "weighted", "params": {"weights": {"j": 1}}, "named": {"j": {"type": "http", "params": params}}}
    file.write_text(yaml.safe_dump({"model": {"path": "m"}, "reward": reward}))
    return file


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"url": URL, "headers": {"Authorization": "Bearer abc"}},
            r"reward.named.j.params.headers.Authorization: a secret",
        ),
        ({"url": URL, "headers": {"X-Api-Key": "abc"}}, r"headers.X-Api-Key: a secret .* \$NAME"),
        ({"url": "http://me:word@host/"}, r"params.url: its password"),
        ({"url": "http://host/?token=abc"}, r"params.url: its token"),
        ({"url": URL, "headers": {"X": "${oc.env:JUDGE_TOKEN}"}}, r"would be saved with the run; write \$JUDGE_TOKEN"),
    ],
)
def test_a_secret_itself_is_refused(tmp_path: Path, monkeypatch, params: dict, message: str) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "do-not-save-me")
    with pytest.raises(BadInput, match=message) as refused:
        load_config(config(tmp_path, **params))
    assert "do-not-save-me" not in str(refused.value) and "abc" not in str(refused.value)


def test_a_reference_stays_one_and_is_read_where_it_is_used(tmp_path: Path, monkeypatch) -> None:
    file = config(tmp_path, url="http://127.0.0.1:9/?key=$JUDGE_KEY", headers={"Authorization": "Bearer $JUDGE_TOKEN"})
    loaded = load_config(file)
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    monkeypatch.setenv("JUDGE_KEY", "k-do-not-save-me")
    with pytest.raises(BadInput, match=r"headers.Authorization: \$JUDGE_TOKEN is not in the environment; export"):
        RewardRunner(loaded.reward)
    monkeypatch.setenv("JUDGE_TOKEN", "t-do-not-save-me")
    with RewardRunner(loaded.reward) as runner:
        assert runner._params["j"]["headers"] == {"Authorization": "Bearer t-do-not-save-me"}
    assert "do-not-save-me" not in dump_config(loaded) and "$JUDGE_TOKEN" in dump_config(loaded)
    assert "do-not-save-me" not in str(loaded)


def test_messages_are_masked(monkeypatch) -> None:
    monkeypatch.setenv("OTHER_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("JUDGE_KEY", "k-do-not-save-me")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false value")
    assert masked("x hunter2hunter2 k-do-not-save-me false value") == "x *** *** false value"
    assert without_secrets(
        {"WANDB_API_KEY": "1", "HF_TOKEN": "2", "HOME": "3", "TOKENIZERS_PARALLELISM": "4"}
    ).keys() == {
        "HOME",
        "TOKENIZERS_PARALLELISM",
    }
    reward = Reward(type="http", params={"url": "http://127.0.0.1:9/?key=$JUDGE_KEY", "retries": "none"})
    with pytest.raises(BadInput) as refused:
        RewardRunner(reward)
    assert "do-not-save-me" not in str(refused.value)


def test_a_failed_judge_is_reported_without_its_key(monkeypatch) -> None:
    from megarl.types import Prompt

    monkeypatch.setenv("JUDGE_KEY", "k-do-not-save-me")
    params = {"url": "http://127.0.0.1:9/?key=$JUDGE_KEY", "retries": 0, "backoff": 0.0}
    with RewardRunner(Reward(type="http", params=params, max_failed_fraction=1.0)) as runner:
        reason = runner.score([(Prompt("p", (1,), None), "x")])[0].reason
    assert "failed 1 times" in reason and "do-not-save-me" not in reason
