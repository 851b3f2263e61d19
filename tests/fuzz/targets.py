"""What reads files and values of others, each as a function of bytes that must work or refuse in one line.

`cases(name)` makes the bytes: valid ones (`seeds`), of which a random edit spoils a part. One process, one folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megarl import manifest
from megarl.config import load_config
from megarl.config.check import _read_config_json
from megarl.config.schema import DataSource, Generate, Reward
from megarl.convert.load import open_weights, read_spec
from megarl.convert.reader import HFReader
from megarl.data import PromptSource, chat, load_tokenizer
from megarl.data.chat import encode, render_prompts
from megarl.data.pairs import PairData
from megarl.data.sft import SFTData
from megarl.data.sources import Row
from megarl.errors import BadInput, RunFailed
from megarl.models.generate import generate_checkpoint
from megarl.platform.safe_loading import NotPlain, check_shards, load_metadata
from megarl.report import write_report
from megarl.rewards import required_field
from megarl.rewards.frames import take_answers
from megarl.rewards.runner import RewardRunner, _Chunk
from megarl.rollout.vllm_engine import Response, check_response
from megarl.trainers.rollout_files import read_groups

REFUSALS = (BadInput, RunFailed)
SMALL_CONFIG = b"""
run_dir: &dir runs/x
model: {path: m, generate: {num_layers: 2, tokenizer: {train_on: [{type: jsonl, path: a}]}}}
parallel: {ep: 2, nproc: 2}
sft: {data: [{type: jsonl, path: *dir}], optimizer: {betas: [0.9, 0.95], schedule: cosine}}
rl: {data: [{type: reasoning_gym, task: chain_sum, params: {a: 1}}], algorithm: {preset: gspo, gate: {low: 0.1, high: 0.2}}}
reward: {type: weighted, params: {weights: {a: 1}}, named: {a: {type: http, params: {url: "http://x", headers: {H: $T}}}}}
eval: {data: [], temperature: 1.0}
log: {profile_steps: [1]}
export: {every: "${parallel.ep}"}
"""
MARK = "<script>alert(1)</script>"
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "/etc/passwd", "\0", "\ud800", "💥" * 50, "a" * 10_000, MARK, "{{ 7*7 }}", "${oc.env:HOME}", "${a}", "none", "nan",
    [], {}, [[]], [None], {"": None}, [1, "a", {}], {"__class__": "x"}, "*a", "!!python/object/apply:os.system [id]",
]  # fmt: skip


# Folders and seeds -----------------------------------------------------------------------------------------------


@cache
def home() -> Path:
    """The only folder a target may write to; `run` is where one case's files go."""
    folder = Path(tempfile.mkdtemp(prefix="megarl-fuzz-"))
    (folder / "run").mkdir()
    shape = Generate(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, context=64,
                     moe_intermediate_size=8, intermediate_size=16, tokenizer={"vocab_size": 300})  # fmt: skip
    generate_checkpoint(folder / "model", shape)
    return folder


@cache
def tokenizer() -> Any:
    return load_tokenizer(home() / "model")


def model_file(name: str) -> bytes:
    return (home() / "model" / name).read_bytes()


@cache
def linked_model(without: str) -> Path:
    """A folder like the model's in which `without` is for a case to write."""
    folder = home() / "run" / f"model-{without}"
    folder.mkdir()
    for file in (home() / "model").iterdir():
        if file.name != without:
            (folder / file.name).hardlink_to(file)
    return folder


def put(name: str, data: bytes) -> Path:
    path = home() / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def safetensors(header: dict[str, Any], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@cache
def metadata_seed() -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    size = torch.Size([4, 2])
    chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2]))]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
    places = {
        MetadataIndex("policy.w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 32),
        MetadataIndex("policy.x"): _StorageInfo("__0_0.distcp", 32, 8),
    }
    state = {"policy.w": tensor, "policy.x": BytesStorageMetadata()}
    return pickle.dumps(Metadata(state, None, places, StorageMeta("here", "1", "2")))


@cache
def common_seed() -> bytes:
    buffer = io.BytesIO()
    torch.save({"step": 3, "state": {"a": torch.zeros(3)}, "text": "x"}, buffer)
    return buffer.getvalue()


class Evil:
    """What a pickle does that must never be done: it leaves a file."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.where,))


def evil_metadata() -> bytes:
    return pickle.dumps({"a": Evil(home() / "pickle-was-run")})


def evil_common() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Evil(home() / "pickle-was-run")}, buffer)
    return buffer.getvalue()


TRAJECTORY = {
    "group_id": "p@1", "sample_index": 0, "prompt_id": "p", "source": "s", "prompt": "1+1=", "response": "2",
    "answer": "2", "score": 1.0, "shaped_reward": 1.0, "reward_failed": False, "rewards": {}, "finish_reason": "stop",
    "prompt_ids": [1, 2], "response_ids": [3], "response_mask": [1], "rollout_log_probs": [-0.5], "policy_version": [0],
    "routed_experts": {"dtype": "uint8", "shape": [2, 2, 2], "base64": "AAECAwABAgM="}, "reward": None, "metadata": {},
}  # fmt: skip
METRICS = {
    "step": 1,
    "unix_time": 1.0,
    "reward/mean": 0.5,
    "time/step": 2.0,
    "time/generate": 1.0,
    "routing/load_max_over_mean/layer_00": 1.2,
}
ANSWERS = b"".join(
    struct.pack("<I", len(body)) + body for body in (b"null", b'[0, 1.0, "", 0.1]', b'[1, NaN, "nan", 0.1]')
)
CHAT = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], "answer": "2"}
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


# Targets ---------------------------------------------------------------------------------------------------------


def config(data: bytes) -> None:
    load_config(put("config.yaml", data))


def override(data: bytes) -> None:
    load_config(put("small.yaml", b"model: {path: model}\nrl: {data: []}\n"), [data.decode(errors="replace")])


def _source(name: str, data: bytes) -> list[DataSource]:
    return [DataSource(type="jsonl", path=str(put(name, data)))]


def jsonl_prompts(data: bytes) -> None:
    reward = Reward(named={"m": Reward(type="math_verify")})
    source = PromptSource(
        _source("rows.jsonl", data), tokenizer(), 1, 40, required_field=lambda name: required_field(reward, name)
    )
    source.next(3)


def jsonl_sft(data: bytes) -> None:
    SFTData(_source("sft.jsonl", data), tokenizer(), 60, 1).next(2)


def jsonl_pairs(data: bytes) -> None:
    PairData(_source("pairs.jsonl", data), tokenizer(), 60, 1).next(2)


def safetensors_header(data: bytes) -> None:
    put("weights/config.json", b"{}")
    reader = HFReader(put("weights/model.safetensors", data).parent)
    for name in reader.tensors:
        reader.stored(name)


def safetensors_index(data: bytes) -> None:
    folder = put("sharded/model.safetensors.index.json", data).parent
    put("sharded/config.json", b"{}")
    put("sharded/a.safetensors", safetensors({"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}))
    HFReader(folder)


def config_json(data: bytes) -> None:
    folder = linked_model("config.json")
    file = folder / "config.json"
    file.write_bytes(data)
    refused: Exception | None = None
    for read in (
        lambda: read_spec(folder),
        lambda: _read_config_json(file),
        lambda: open_weights(folder, read_spec(folder)),
    ):
        try:
            read()
        except REFUSALS as error:
            refused = refused or error
    if refused:
        raise refused


def _tokenizer(name: str, data: bytes) -> None:
    folder = linked_model(name)
    (folder / name).write_bytes(data)
    found = load_tokenizer(folder)
    encode(found, ["1 + 1 = 2 <|im_end|>"])
    render_prompts(found, [Row({"prompt": "1 + 1"}, "row 1")])


def tokenizer_json(data: bytes) -> None:
    _tokenizer("tokenizer.json", data)


def tokenizer_config(data: bytes) -> None:
    _tokenizer("tokenizer_config.json", data)


def chat_template(data: bytes) -> None:
    found = load_tokenizer(home() / "model", put("template.jinja", data))
    usual, chat.TEMPLATE_SECONDS = chat.TEMPLATE_SECONDS, 0.05  # ten thousand endless ones would take a day
    try:
        render_prompts(found, [Row({"prompt": "1 + 1"}, "row 1")])
    finally:
        chat.TEMPLATE_SECONDS = usual


def dcp_metadata(data: bytes) -> None:
    try:
        load_metadata(data)
    except NotPlain as error:
        raise BadInput(str(error)) from None
    finally:
        folder = put("shards/.metadata", data).parent
    (folder / "__0_0.distcp").write_bytes(b"\0" * 40)
    check_shards(folder)


def dcp_common(data: bytes) -> None:
    put("shards2/.metadata", metadata_seed())
    put("shards2/__0_0.distcp", b"\0" * 40)
    check_shards(put("shards2/common.pt", data).parent)


def manifest_json(data: bytes) -> None:
    folder = put("step/manifest.json", data).parent
    put("step/state.json", b"{}")
    found = manifest.listed(folder)
    if isinstance(found, dict):
        found = manifest.problem(folder, found)
    if found is not None:
        raise BadInput(found)


def rollouts(data: bytes) -> None:
    read_groups(put("step_000001.jsonl", data))


def engine_output(data: bytes) -> None:
    try:
        value = json.loads(data)
    except ValueError:
        return
    value = value if isinstance(value, dict) else {}
    tokens, log_probs = ([x for x in _list(value.get(k)) if isinstance(x, int | float)] for k in ("tokens", "log_probs"))
    tokens = [int(x) for x in tokens if isinstance(x, int) or math.isfinite(x)]
    log_probs = [x if isinstance(x, float) else float(max(-(2**70), min(x, 2**70))) for x in log_probs]
    rows = [np.zeros(shape, np.uint8) for shape in _list(value.get("routed")) if _is_shape(shape)]
    check_response(Response(tokens, log_probs, rows, str(value.get("end"))), 100)


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 6 and all(type(n) is int and 0 <= n < 9 for n in value)


def reward_answers(data: bytes) -> None:
    chunk, buffer = _Chunk(None, [0, 1, 2]), bytearray(data)
    runner = object.__new__(RewardRunner)
    runner._rewards = {None: Reward()}
    try:
        for answer in take_answers(buffer):
            if answer is not None:
                result = runner._result(chunk, answer)
                assert isinstance(result.score, float) and (result.failed or np.isfinite(result.score))
                chunk.done += 1
    except (ValueError, TypeError):
        raise RunFailed("the scoring process wrote what is no answer") from None


def report(data: bytes) -> None:
    """The bytes are four files of a run, with a line of dashes between them."""
    parts = (data.split(b"\n---\n") + [b""] * 4)[:4]
    for name, part in zip(("config.yaml", "summary.json", "rl/metrics.jsonl", "rl/rollouts/step_000001.jsonl"), parts):
        put(f"reported/{name}", part)
    assert MARK not in write_report(home() / "run" / "reported").read_text(), (
        "the report holds what a model wrote as it is"
    )


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    edit: str = "bytes"  # how a seed is spoilt: as bytes, or as JSON, JSON lines or YAML


TARGETS = {
    "config files": Target(config, lambda: [SMALL_CONFIG], "yaml"),
    "overrides": Target(override, lambda: [b"rl.steps=3", b"rl.data=[{type: jsonl, path: x}]", b"reward.params={a: 1}"]),
    "JSONL prompts": Target(jsonl_prompts, lambda: [lines({"prompt": "1+1=", "answer": 2}, CHAT | {"reward": "m"})], "jsonl"),
    "JSONL SFT": Target(jsonl_sft, lambda: [lines(CHAT, {"prompt": "a", "response": "b"}, {"text": "abc"})], "jsonl"),
    "JSONL preferences": Target(jsonl_pairs, lambda: [lines(PAIR, PAIR)], "jsonl"),
    "safetensors header": Target(
        safetensors_header,
        lambda: [
            safetensors({"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}),
            safetensors(
                {
                    "__metadata__": {"format": "pt"},
                    "a": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
                    "b": {"dtype": "U8", "shape": [32], "data_offsets": [32, 64]},
                }
            ),
        ],
    ),
    "safetensors index": Target(
        safetensors_index, lambda: [lines({"metadata": {}, "weight_map": {"w": "a.safetensors"}})], "json"
    ),
    "config.json": Target(config_json, lambda: [model_file("config.json")], "json"),
    "tokenizer.json": Target(tokenizer_json, lambda: [model_file("tokenizer.json")], "json"),
    "tokenizer_config.json": Target(tokenizer_config, lambda: [model_file("tokenizer_config.json")], "json"),
    "chat template": Target(
        chat_template,
        lambda: [
            b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
            b"{% for i in range(9999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}",
            b"{{ 'a' * 9999999999 }}{{ ''.__class__.__mro__ }}{{ messages.append(1) }}{{ 9 ** 9 ** 9 }}",
        ],
    ),
    "checkpoint .metadata": Target(dcp_metadata, lambda: [metadata_seed(), evil_metadata()]),
    "checkpoint common.pt": Target(dcp_common, lambda: [common_seed(), evil_common()]),
    "checkpoint manifest.json": Target(
        manifest_json,
        lambda: [lines({"files": {"state.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}})],
        "json",
    ),
    "recorded rollouts": Target(rollouts, lambda: [lines(TRAJECTORY, TRAJECTORY | {"sample_index": 1})], "jsonl"),
    "engine outputs": Target(
        engine_output,
        lambda: [lines({"tokens": [1, 2, 99], "log_probs": [-1.0, -0.5, 0.0], "routed": [[3, 2, 2], [1, 2, 2]], "end": "stop"})],
        "json",
    ),
    "answers of reward workers": Target(reward_answers, lambda: [ANSWERS]),
    "report": Target(
        report,
        lambda: [
            b"\n---\n".join(
                (
                    yaml.safe_dump({"run_dir": MARK, "model": {"path": MARK}, "rl": {"algorithm": {"preset": MARK}}}).encode(),
                    lines({"steps": 1, MARK: MARK, "machine": {"cpu": MARK}}),
                    lines(METRICS, METRICS | {"step": 2, f"time/{MARK}": 1.0, f"reward/{MARK}": 2.0}),
                    lines(TRAJECTORY | {"response": MARK, "prompt": MARK, "answer": MARK, "finish_reason": MARK}),
                )
            )
        ],
    ),
}  # fmt: skip


# Cases -----------------------------------------------------------------------------------------------------------


def case(name: str, number: int) -> bytes:
    """Case `number` of a target; the first ones are its seeds as they are."""
    target = TARGETS[name]
    seeds = target.seeds()
    if number < len(seeds):
        return seeds[number]
    rng = random.Random(f"{name}/{number}")
    seed = rng.choice(seeds)
    if target.edit != "bytes" and rng.random() < 0.75:
        return _spoilt_values(seed, target.edit, rng)
    return _spoilt_bytes(seed, seeds, rng)


def _spoilt_bytes(seed: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            del data[at : at + rng.choice((1, 4, 64, 10**6))]
        elif kind == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 40))))
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data))))
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 16, 256))] * rng.choice((1, 2, 30))
        elif kind == 5:
            data[at:at] = json.dumps(rng.choice(HOSTILE)).encode()
        else:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data[: 1 << 18])


def _spoilt_values(seed: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "jsonl":
        rows = [json.loads(line) for line in seed.splitlines()]
        rows = [_spoilt(row, rng) if rng.random() < 0.7 else row for row in rows]
        return "\n".join(json.dumps(row) for row in rows).encode()
    if kind == "json":
        return json.dumps(_spoilt(json.loads(seed), rng)).encode()
    value = _spoilt(yaml.safe_load(seed), rng)
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
    except yaml.YAMLError:
        return json.dumps(value).encode()


def _spoilt(value: Any, rng: random.Random) -> Any:
    """The value with one to three leaves, keys or branches replaced, removed, doubled or moved."""
    value = _copy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _copy(rng.choice(HOSTILE))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind < 3:
            holder[key] = _copy(rng.choice(HOSTILE))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        elif isinstance(holder, dict):
            holder[str(rng.choice(HOSTILE))[:100]] = _copy(holder[key])
        else:
            holder.append(_copy(holder[key]))
    return value


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def attempt(name: str, data: bytes) -> str:
    """ "works", or the refusal of one line. Raises whatever else a target raises, and AssertionError for what it left."""
    try:
        TARGETS[name].run(data)
        said = "works"
    except REFUSALS as error:
        said = " ".join(str(error).split())
        assert said, "a refusal that says nothing"
    left = {path.name for path in home().iterdir()} - {"run", "model"}
    assert not left, f"files outside the run folder: {left}"
    return said
