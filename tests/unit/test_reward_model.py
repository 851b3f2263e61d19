"""Preference pairs, their packing, the loss, and what the scorer makes of rewards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megarl.config.schema import DataSource, Tokenizer
from megarl.data import BatchLayout, PairData, pair_micro_batches, render_sft
from megarl.data.pairs import pair_batch
from megarl.data.sources import Row
from megarl.errors import BadInput
from megarl.metrics import merge
from megarl.models.generate import make_tokenizer
from megarl.trainers.reward_model import preference_loss


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(Tokenizer(), 64)


def source(folder: Path, *rows: object) -> DataSource:
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return DataSource(type="jsonl", path=str(folder / "pairs.jsonl"))


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# The loss ------------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_closed_form() -> None:
    """log(1 + exp(-d)) and -1 / (1 + exp(d)) of each pair, in float64, over the pairs of the whole step."""
    scores = torch.tensor([0.3, -0.2, 4.0, 4.0, -60.0, 50.0, 90.0, -90.0, -1.0, 2.5], requires_grad=True)
    pairs = 7
    loss, metrics = preference_loss(None, scores, None, pairs)
    loss.backward()
    x = scores.detach().numpy().astype(np.float64)
    d = x[0::2] - x[1::2]
    expected = np.logaddexp(0.0, -d)
    slope = -np.exp(-np.logaddexp(0.0, d)) / pairs
    assert loss.item() == pytest.approx(expected.sum() / pairs, rel=1e-6)
    assert scores.grad[0::2].numpy() == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert scores.grad[1::2].numpy() == pytest.approx(-slope, rel=1e-6, abs=1e-9)
    values = {name: metric.value() for name, metric in metrics.items()}
    assert values["reward_model/loss"] == pytest.approx(expected.mean(), rel=1e-6)
    assert values["reward_model/accuracy"] == 2 / 5  # a tie is not right
    assert values["reward_model/margin"] == pytest.approx(d.mean(), rel=1e-6)
    assert values["reward_model/score_mean"] == pytest.approx(x.mean(), rel=1e-6)


def test_micro_batches_add_up_to_the_step() -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1))
    whole, metrics = preference_loss(None, scores, None, 6)
    parts = [preference_loss(None, piece, None, 6) for piece in (scores[:2], scores[2:2], scores[2:12])]
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(float(whole), rel=1e-6)
    merged: dict = {}
    for _, own in parts:
        merge(merged, own)
    assert {n: m.value() for n, m in merged.items()} == pytest.approx({n: m.value() for n, m in metrics.items()})


# The pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": turns("1 + 1", "2"), "rejected": turns("1 + 1", "3")},
        {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
        {"prompt": turns("1 + 1"), "chosen": "2", "rejected": turns("1 + 1", "3")},
        {"prompt": "1 + 1", "chosen": turns("", "2")[1:], "rejected": turns("", "3")[1:]},
        {"prompt": "1 + 1", "chosen": turns("1 + 1", "2"), "rejected": turns("1 + 1", "3")},
    ],
)
def test_every_form_of_a_pair_is_the_same_two_conversations(tmp_path, tokenizer, row) -> None:
    batch = PairData([source(tmp_path, row)], tokenizer, 64, 0).next(1)
    expected = [render_sft(tokenizer, Row({"prompt": "1 + 1", "response": text}, ""))[0] for text in "23"]
    assert batch.lengths.tolist() == [len(side) for side in expected]
    assert batch.tokens.tolist() == np.concatenate(expected).tolist()
    assert batch.group_index.tolist() == [0, 0]
    assert expected[0][-1] == tokenizer.eos_token_id  # the token that scores are read at


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "no rejected; a preference needs chosen and rejected"),
        ({"prompt": "p"}, "no chosen and no rejected"),
        (GOOD | {"rejected": None}, "no rejected"),
        (GOOD | {"rejected": "a"}, "chosen and rejected are the same"),
        (GOOD | {"rejected": turns("p", "a")}, "chosen and rejected are the same"),
        (GOOD | {"chosen": " "}, "chosen ends with .* not empty"),
        (GOOD | {"chosen": []}, r"chosen is \[\]"),
        (GOOD | {"chosen": turns("p", "a", "q")}, "chosen ends with .*must be the assistant's"),
        (GOOD | {"chosen": ["a"]}, r"chosen is \['a'\]"),
        (GOOD | {"chosen": 3}, "chosen is 3"),
        (GOOD | {"prompt": 3}, "prompt is 3"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a text and there is no prompt"),
    ],
)
def test_a_row_that_is_no_preference_is_named_by_file_and_line(tmp_path, tokenizer, row, message) -> None:
    with pytest.raises(BadInput, match=rf"pairs\.jsonl:2: {message}") as caught:
        PairData([source(tmp_path, GOOD, row)], tokenizer, 64, 0)
    assert "\n" not in str(caught.value)


def test_a_pair_with_a_long_side_is_dropped_whole_and_counted(tmp_path, tokenizer) -> None:
    data = PairData([source(tmp_path, GOOD, GOOD | {"rejected": "b" * 20})], tokenizer, 10, 0)
    assert len(data) == 1 and data.dropped == {"too_long": 1}
    assert data.longest == data.next(1).tokens.numel() and data.ends == {tokenizer.eos_token_id}
    with pytest.raises(
        BadInput, match=r"no pair is left \(the shortest has \d+ tokens on its longer side, the limit is 2"
    ):
        PairData([source(tmp_path, GOOD)], tokenizer, 2, 0)


def test_pairs_are_drawn_in_an_order_that_continues(tmp_path, tokenizer) -> None:
    rows = [{"prompt": str(i), "chosen": "a" * (i + 1), "rejected": "b"} for i in range(5)]
    data = PairData([source(tmp_path, *rows)], tokenizer, 64, 3)
    data.next(4)
    again = PairData([source(tmp_path, *rows)], tokenizer, 64, 3)
    again.load_state_dict(data.state_dict())
    assert data.next(7).tokens.tolist() == again.next(7).tokens.tolist()
    assert [len(batch) // 2 for batch in again.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize(("dp", "budget", "multiple"), [(1, 400, 1), (2, 60, 4), (3, 41, 2), (8, 64, 8)])
def test_both_sides_of_a_pair_share_a_micro_batch(dp, budget, multiple) -> None:
    rng = np.random.default_rng(dp)
    pairs = [tuple(np.full(rng.integers(1, 20), i, np.int32) for _ in range(2)) for i in range(7)]
    batch = pair_batch(pairs)
    seen, counts = [], set()
    for rank in range(dp):
        packed = pair_micro_batches(batch, budget, BatchLayout(dp=dp, dp_rank=rank, row_multiple=multiple))
        counts.add(len(packed))
        for micro in packed:
            index = micro.batch.group_index.tolist()
            assert index[0::2] == index[1::2]
            assert micro.tokens.numel() <= budget and micro.tokens.numel() % multiple == 0
            seen += index[0::2]
            for pair, (one, other) in zip(index[0::2], zip(*[iter(micro.batch.lengths.tolist())] * 2)):
                assert (one, other) == tuple(len(side) for side in pairs[pair])
    assert sorted(seen) == list(range(7)) and len(counts) == 1
