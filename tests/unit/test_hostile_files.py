"""Files of others: bombs, ways out of a folder, code that must not run, text that must not become HTML."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from megarl.bounds import TooMuch, bounded
from megarl.config import load_config
from megarl.config.schema import Generate
from megarl.convert.hf_io import copy_side_files
from megarl.convert.load import read_spec
from megarl.convert.reader import HFReader
from megarl.data import chat, load_tokenizer
from megarl.data.chat import encode, render_prompts
from megarl.data.sources import Row
from megarl.errors import BadInput
from megarl.models.generate import generate_checkpoint
from megarl.platform.safe_loading import NotPlain, check_shards, install, load_metadata
from megarl.report import write_report
from tests.fuzz.targets import metadata_seed

SMALL = Generate(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=2, moe_intermediate_size=8,
                 context=64, tokenizer={"vocab_size": 300})  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    generate_checkpoint(folder, SMALL)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)), "aliases"),
        ("a: &a [*a]\n", "aliases|recursive|found undefined"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested|recursion|cannot be read|aliases"),
        ("x0: aaaaaaaa\n" + "".join(f"x{i}: '{f'${{x{i - 1}}}' * 2}'\n" for i in range(1, 40)), "takes (longer|more)"),
        ("a: !!python/object/apply:os.system ['touch /tmp/yaml-was-run']\n", "YAML|constructor"),
    ],
)  # fmt: skip
def test_configurations_that_grow_or_act_are_refused(tmp_path: Path, monkeypatch, text: str, message: str) -> None:
    monkeypatch.setattr("megarl.config.load.READ_SECONDS", 0.5)
    file = tmp_path / "project.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        load_config(file)
    assert not Path("/tmp/yaml-was-run").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.31 s"),
        ("{{ 'a' * 9999999999 }}", "more than 1024 MiB"),
        (
            "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
            "takes",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|not callable"),
        ("{{ cycler.__init__.__globals__.os.system('touch /tmp/jinja-was-run') }}", "unsafe|undefined"),
        ("{{ range(10**9) | list }}", "too big|longer|more"),
    ],
)
def test_chat_templates_are_rendered_in_a_sandbox(
    model: Path, tmp_path: Path, monkeypatch, template: str, message: str
) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = load_tokenizer(model, tmp_path / "t.jinja")
    with pytest.raises(BadInput, match=f"row 1: the chat template fails: .*({message})"):
        render_prompts(tokenizer, [Row({"prompt": "x"}, "row 1")])
    assert not Path("/tmp/jinja-was-run").exists()


def test_bounds_are_lifted_afterwards() -> None:
    with pytest.raises(TooMuch, match="more than 16 MiB"), bounded(5, 16 << 20):
        bytearray(1 << 30)
    assert len(bytearray(1 << 27)) == 1 << 27
    with pytest.raises(TooMuch, match="longer than 0.1 s"), bounded(0.1):
        while True:
            pass


def test_code_of_a_checkpoint_is_never_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('its code was run')")
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    try:
        load_tokenizer(copy)  # its own class is left alone when the files do without
    except BadInput as error:
        assert "its code was run" not in str(error)


def test_an_absurd_token_id_is_refused_before_room_is_made_for_it(copy: Path) -> None:
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["x"] = 2**31
    file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="token id 2147483648"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    "key, value", [("num_hidden_layers", 2**31), ("num_experts", 2**40), ("rms_norm_eps", 10**400)]
)
def test_absurd_sizes_are_refused_before_anything_is_counted(copy: Path, key: str, value: int) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(BadInput, match=f"{key}=.* must be a positive (int|float) of at most"):
        read_spec(copy)


def test_a_tokenizer_without_its_unknown_token_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer.json").read_text())
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "nowhere"}
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(settings | {"model": model, "added_tokens": [], "post_processor": None})
    )
    with pytest.raises(BadInput, match="cannot take a text"):
        encode(SimpleNamespace(is_fast=True, backend_tokenizer=backend), ["b"])


def test_only_safetensors_are_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(copy / "bin-was-run"),))

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="only safetensors"):
        HFReader(copy)
    assert not (copy / "bin-was-run").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_name_a_file_elsewhere(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BadInput, match=r"does not name a file|no such file|truncated|out of its folder"):
        HFReader(copy)


def test_links_out_of_a_folder_are_not_followed(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the user")
    (copy / "notes.txt").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="notes.txt: leads to .*out of its folder"):
        copy_side_files(copy, tmp_path / "out")
    assert not (tmp_path / "out" / "notes.txt").exists()
    weights = copy / "model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(BadInput, match="leads to"):
        HFReader(copy)
    # the cache of Hugging Face: snapshots/REVISION/FILE -> ../../blobs/HASH
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for file in copy.iterdir():
        if file.name not in ("notes.txt", "model.safetensors"):
            (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "weights").rename(tmp_path / "models--x" / "blobs" / "f00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    assert HFReader(snapshot).tensors


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 101 << 20])
def test_a_header_larger_than_its_file_takes_no_memory(copy: Path, length: int) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with bounded(10, 64 << 20), pytest.raises(BadInput, match="truncated or not a safetensors file"):
        HFReader(copy)


def test_a_pickle_that_asks_for_endless_room_is_refused() -> None:
    with pytest.raises(NotPlain, match="memory"):
        load_metadata(b"\x80\x04Nr\xff\xff\xff\xff.")  # put None at place 2^32 - 1 of the memo


class Acts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_an_object_beside_the_tensors_that_acts_is_refused_before_it_does(tmp_path: Path) -> None:
    """One behind the table of contents, as Megatron keeps its extra states; torch itself would load it with pickle."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    install()
    item = io.BytesIO()
    torch.save(Acts(tmp_path / "was-run"), item)
    item.seek(0)
    planner = DefaultLoadPlanner()
    planner.state_dict, planner.flatten_state_dict = {}, False
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="extra")), item)
    assert not (tmp_path / "was-run").exists() and planner.state_dict == {}


MARK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"


def test_the_report_shows_markup_as_text(tmp_path: Path) -> None:
    run = tmp_path / "<script>alert(1)<"
    (run / "rl" / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(
        json.dumps({"model": {"path": MARK}, "rl": {"algorithm": {"preset": MARK}}, "run_dir": MARK})
    )
    (run / "summary.json").write_text(json.dumps({MARK: MARK, "machine": {"a": MARK}, "steps": 2}))
    names = {f"time/{MARK}": 1.0, f"reward/{MARK}": 1.0, f"routing/load_max_over_mean/{MARK}": 1.5, f"eval/{MARK}": 0.5}
    rows = [{"step": step, "time/step": 3.0, "reward/mean": 0.5, **names} for step in (1, 2, 3)]
    (run / "rl/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "rl/eval.jsonl").write_text(json.dumps({"step": 0, "accuracy": 0.5, "source": MARK}))
    sample = {
        "response": MARK,
        "prompt": MARK,
        "answer": MARK,
        "score": 1.0,
        "finish_reason": MARK,
        "response_ids": [1],
    }
    (run / "rl/rollouts/step_000001.jsonl").write_text(json.dumps(sample))
    html = write_report(run).read_text()
    assert html.count("<script>") == 1 and "<img" not in html and "&lt;script&gt;alert(1)" in html


def test_shards_cannot_lie_elsewhere(tmp_path: Path) -> None:
    shards, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    shards.mkdir()
    elsewhere.write_bytes(b"\0" * 40)
    (shards / ".metadata").write_bytes(metadata_seed())
    (shards / "__0_0.distcp").write_bytes(b"\0" * 40)
    check_shards(shards)
    (shards / "__0_0.distcp").unlink()
    (shards / "__0_0.distcp").symlink_to(elsewhere)
    with pytest.raises(BadInput, match="no file in its folder"):
        check_shards(shards)


@pytest.mark.parametrize("name", [b"../elsewhere", b"/tmp/elsewhe", b"sub/../../el", b"a\0.distcp123"])
def test_a_table_of_contents_names_files_of_its_folder_only(name: bytes) -> None:
    with pytest.raises(NotPlain, match="not in its folder"):
        load_metadata(metadata_seed().replace(b"__0_0.distcp", name[:12]))
