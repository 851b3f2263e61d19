"""Conversion on one process: logits and bits against transformers, config.json in both forms, damaged files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.config.schema import Model, Parallel
from megarl.convert import FAMILIES, family, load_hf, pad_token_id, read_spec, save_hf, stream_hf, validate_folder
from megarl.convert.hf_io import locked
from megarl.convert.load import matched
from megarl.convert.reader import HFReader
from megarl.convert.save import Export, copy_aside, export_weights
from megarl.convert.stream import Weights
from megarl.data import BatchLayout
from megarl.errors import BadInput, RunFailed
from tests.dist.checkpoints import make
from tests.dist.convert_cases import logits, same, tokens

VARIANTS = {
    "moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "moe-raw-gates": ("qwen3_moe", {"norm_topk_prob": False}),
    "moe-mixed": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [2], "decoder_sparse_step": 2}),
    "dense": ("qwen3", {}),
    "dense-tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def mesh():
    import torch.distributed as dist

    from megarl.parallel import Mesh

    yield Mesh.build(Parallel())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen3-MoE checkpoint that tests copy before damaging it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make(folder, norm_topk_prob=True)
    return folder


def build(path, mesh):
    from megarl.models.build import build_model

    spec = read_spec(path)
    chunks = build_model(spec, Model(path=str(path)), mesh, Parallel())
    for parameter in chunks[0].parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    load_hf(path, chunks, spec, mesh)
    return chunks, spec


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_bits_equal_transformers(name, mesh, tmp_path):
    kind, changes = VARIANTS[name]
    reference = make(tmp_path / "in", kind, **changes)
    chunks, spec = build(tmp_path / "in", mesh)
    with torch.no_grad():
        expected = reference(tokens(spec.vocab_size)).logits[0]
    assert expected.abs().max() > 0.5
    assert (logits(chunks, spec, mesh) - expected).abs().max() <= 1e-5

    before = load_file(tmp_path / "in" / "model.safetensors")
    assert same(dict(stream_hf(chunks, spec, mesh)), before)
    save_hf(tmp_path / "out", chunks, spec, mesh)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), before)
    assert read_spec(tmp_path / "out") == spec  # here config.json was written from the spec
    again = type(reference).from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(tokens(spec.vocab_size)).logits[0], expected)


@pytest.mark.parametrize("name", ["moe-mixed", "dense-tied"])
def test_reward_model_keeps_its_bits_and_its_scores(name, mesh, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from megarl.config.schema import Config
    from megarl.data import pack
    from megarl.learner.policy import Policy
    from tests.dist.learner_cases import fixed_batch

    kind, changes = VARIANTS[name]
    make(tmp_path / "in", kind, scorer=True, **changes)
    before = load_file(tmp_path / "in" / "model.safetensors")
    assert "score.weight" in before and "lm_head.weight" not in before
    reward = Policy.from_hf(tmp_path / "in", Config(model=Model(path="unused")), mesh, role="reward")
    assert reward.spec == read_spec(tmp_path / "in") and reward.spec.head == "scalar"
    save_hf(tmp_path / "alone", reward.modules, reward.spec, mesh)
    save_hf(tmp_path / "out", reward.modules, reward.spec, mesh, extra_from=tmp_path / "in")
    for folder in ("alone", "out"):
        assert same(load_file(tmp_path / folder / "model.safetensors"), before)
        assert read_spec(tmp_path / folder) == reward.spec

    batch = fixed_batch()
    batch.tokens[batch.offsets()[1:3] - 2] = 0  # a padding token inside a sequence is none
    mine = reward.scores([pack(batch, range(len(batch)), BatchLayout(row_multiple=8))])[0]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == 0
    padded = torch.zeros(len(batch), int(batch.lengths.max()), dtype=torch.int64)
    for row, sequence in enumerate(batch.tokens.split(batch.lengths.tolist())):
        padded[row, : len(sequence)] = sequence
    with torch.no_grad():
        expected = theirs.float()(padded).logits[:, 0]
    assert expected.std() > 0.1
    assert (mine - expected).abs().max() <= 1e-4


def test_reward_model_from_a_language_model(mesh, tmp_path):
    """Its weights but for the head, which is 0; the export takes the config and the padding token along."""
    from transformers import AutoModelForSequenceClassification

    from megarl.config.schema import Config
    from megarl.learner.policy import Policy

    make(tmp_path / "lm", "qwen3", tie_word_embeddings=True)
    (tmp_path / "lm" / "generation_config.json").write_text('{"pad_token_id": 5}')
    reward = Policy.from_hf(tmp_path / "lm", Config(model=Model(path="unused")), mesh, role="reward")
    save_hf(tmp_path / "rm", reward.modules, reward.spec, mesh, extra_from=tmp_path / "lm")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("lm", "rm"))
    assert torch.equal(after.pop("score.weight"), torch.zeros(1, 64))
    assert same(after, {name: tensor for name, tensor in before.items() if name != "lm_head.weight"})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert (type(loaded).__name__, loaded.config.pad_token_id) == ("Qwen3ForSequenceClassification", 5)
    with pytest.raises(BadInput, match="a reward model cannot be the policy"):
        Policy.from_hf(tmp_path / "rm", Config(model=Model(path="unused")), mesh)
    damaged = shutil.copytree(tmp_path / "rm", tmp_path / "damaged")
    rewrite(damaged, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(BadInput, match="score.weight is missing"):
        Policy.from_hf(damaged, Config(model=Model(path="unused")), mesh, role="critic")


@pytest.mark.parametrize(
    "tokenizer, found",
    [
        ({"pad_token": "<pad>"}, 9),
        ({"pad_token": {"content": "<pad>", "special": True}}, 9),
        ({"pad_token": None}, None),
        (None, None),
    ],
)
def test_padding_token_of_a_folder_whose_configs_name_none(tokenizer, found, tmp_path):
    (tmp_path / "config.json").write_text('{"pad_token_id": null}')
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 8, "content": "<eos>"}, {"id": 9, "content": "<pad>"}]}'
    )
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert pad_token_id(tmp_path) == found


def test_sharded_export_loads_and_keeps_side_files(checkpoint, mesh, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 7}')
    chunks, spec = build(source, mesh)
    out = tmp_path / "deep" / "out"
    save_hf(out, chunks, spec, mesh, dtype="bfloat16", extra_from=source, max_file_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((out / file).stat().st_size < 110_000 for file in files)
    before = load_file(source / "model.safetensors")
    merged = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert same(merged, {name: tensor.bfloat16() for name, tensor in before.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text()) == {"top_k": 7}
    assert (out / "tokenizer.json").exists()
    again, _ = build(out, mesh)  # the sharded files are read back, into float32
    assert same(dict(stream_hf(again, spec, mesh)), {k: v.bfloat16().float() for k, v in before.items()})

    save_hf(out, chunks, spec, mesh, extra_from=source)  # an export replaces an earlier one, whole
    assert same(load_file(out / "model.safetensors"), before)
    assert not (out / "model.safetensors.index.json").exists()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("index", [(), (0, 3), (2, 2), (slice(1, 4),), (slice(None), slice(1, 2)), (1, slice(None), 5)])
def test_ranges_are_those_of_the_tensor(index, tmp_path):
    """Short and long stretches, of which the long ones are read one by one."""
    tensors = {"short": torch.randn(5, 4, 7), "long": torch.randn(3, 4, 6000), "half": torch.randn(4, 4, 6).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = HFReader(tmp_path)
    for name, tensor in tensors.items():
        spans = [slice(i, i + 1) if isinstance(i, int) else i for i in index]
        spans = tuple(slice(*s.indices(n)) for s, n in zip([*spans, *[slice(None)] * 3], tensor.shape))
        assert torch.equal(reader.read(name, spans), tensor[spans])
        target = torch.full((8, 8, 6000), -1.0)[tuple(slice(0, s.stop - s.start) for s in spans)]  # not contiguous
        reader.read_into(target, name, spans)
        assert torch.equal(target, tensor[spans].float())


def test_fp8_blocks_are_read_and_written_by_the_formula(mesh, tmp_path):
    """A weight is its e4m3 number times the factor of its block: here by hand, in float64, for ragged blocks too."""
    make(tmp_path / "in", hidden_size=160, moe_intermediate_size=136, num_hidden_layers=1)
    chunks, spec = build(tmp_path / "in", mesh)
    save_hf(tmp_path / "fp8", chunks, spec, mesh, dtype="fp8", extra_from=tmp_path / "in")
    before, stored = load_file(tmp_path / "in" / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")
    by_hand, coded = {}, 0
    for name, tensor in before.items():
        scale = stored.get(f"{name}_scale_inv")
        assert (scale is None) == ("_proj" not in name), name
        if scale is None:
            by_hand[name] = tensor.bfloat16().float()
            continue
        coded += 1
        assert scale.shape == (-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) and scale.dtype == torch.float32
        wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
        by_hand[name] = (stored[name].double() * wide).float()
        block = tensor[:128, :128].abs().max() / 448
        assert torch.isclose(scale[0, 0], block) and (by_hand[name] - tensor).abs().max() <= tensor.abs().max() / 16
    assert coded == 4 + 3 * 8
    assert "quantization_config" in json.loads((tmp_path / "fp8" / "config.json").read_text())
    again, spec_again = build(tmp_path / "fp8", mesh)
    assert spec_again == spec and same(dict(stream_hf(again, spec, mesh)), by_hand)
    name, part = "model.layers.0.self_attn.o_proj.weight", (slice(130, 140), slice(50, 90))  # in the second row of blocks
    assert torch.equal(HFReader(tmp_path / "fp8").read(name, part), by_hand[name][part])
    save_hf(tmp_path / "plain", again, spec, mesh, dtype="float32", extra_from=tmp_path / "fp8")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert same(load_file(tmp_path / "plain" / "model.safetensors"), by_hand)


def test_tensors_kept_aside_are_written_back(checkpoint, mesh, tmp_path, monkeypatch):
    """With a table that sets the layer after the last aside, as the tables with multi-token prediction do."""
    source = shutil.copytree(checkpoint, tmp_path / "in")
    extra = {"model.layers.4.eh_proj.weight": torch.randn(3, 5).half(), "model.layers.4.count": torch.arange(3)}
    rewrite(source, lambda tensors: tensors.update(extra))
    with pytest.raises(BadInput, match="layers.4.count belongs to no part"):
        build(source, mesh)
    table = replace(FAMILIES["qwen3_moe"], aside=lambda spec: (f"model.layers.{spec.num_layers}.",))
    monkeypatch.setitem(FAMILIES, "qwen3_moe", table)
    chunks, spec = build(source, mesh)
    save_hf(tmp_path / "out", chunks, spec, mesh, extra_from=source)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors"))
    assert sorted(copy_aside(source, tmp_path, spec)) == sorted(extra)
    assert same(load_file(tmp_path / "aside.safetensors"), extra)


def test_a_cut_export_goes_on_and_a_held_place_is_refused(checkpoint, mesh, tmp_path):
    chunks, spec = build(checkpoint, mesh)
    held = {name: tensor for name, (_, tensor) in matched(chunks, spec).items()}
    export = Export(extra_from=checkpoint, max_file_bytes=100_000, settings={"of": "this model"})
    fetched = []

    def fetch(names, broken=True):
        fetched.append(names[0])
        if broken and names[0].startswith("decoder.layers.2."):
            raise RunFailed("cut")
        return held

    whole = Weights.of(held)
    with pytest.raises(RunFailed, match="cut"):
        export_weights(tmp_path / "out", replace(whole, fetch=fetch), spec, mesh, export)
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".out.new").glob("*.safetensors")}
    assert len(done) > 2 and [entry.name for entry in tmp_path.iterdir()] == [".out.new"]
    (tmp_path / ".out.lock").write_text("process 1 on another machine")  # its process is gone, or never was
    with locked(tmp_path / "out"), pytest.raises(BadInput, match="process .* writes there"):
        export_weights(tmp_path / "out", whole, spec, mesh, export)
    fetched.clear()
    export_weights(tmp_path / "out", replace(whole, fetch=lambda names: fetch(names, False)), spec, mesh, export)
    assert not any(name.startswith("decoder.layers.0.") for name in fetched)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done
    merged = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert same(merged, load_file(checkpoint / "model.safetensors"))
    assert not list((tmp_path / "out").glob(".*")) and [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_export_refuses_other_places_and_leaves_nothing(checkpoint, mesh, tmp_path, monkeypatch):
    chunks, spec = build(checkpoint, mesh)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("x")
    with pytest.raises(BadInput, match="not an earlier export"):
        save_hf(tmp_path / "notes", chunks, spec, mesh)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot be written"):
        save_hf(tmp_path / "file" / "out", chunks, spec, mesh)
    make(tmp_path / "other", "qwen3")
    with pytest.raises(BadInput, match="another model"):
        save_hf(tmp_path / "out", chunks, spec, mesh, extra_from=tmp_path / "other")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "notes", "other"]


# -- config.json ---------------------------------------------------------------------------------------------------

V4 = json.loads((Path(__file__).parents[2] / "configs/models/qwen3-30b-a3b/config.json").read_text())


def spec_of(config):
    return family(config["model_type"]).read_config(config)


def test_transformers_4_and_5_forms_are_one_model():
    """Qwen3-30B-A3B's published config.json, and what transformers 5 makes of it."""
    from transformers import Qwen3MoeConfig

    spec = spec_of(V4)
    assert (spec.rope.theta, spec.num_experts, spec.top_k, spec.norm_eps) == (1e6, 128, 8, 1e-6)
    assert spec.moe_layers == tuple(range(48)) and spec.norm_topk_prob and not spec.tie_embeddings
    v5 = Qwen3MoeConfig(**{k: v for k, v in V4.items() if k != "transformers_version"}).to_dict()
    assert "num_local_experts" in v5 and "rope_parameters" in v5 and "rope_theta" not in v5
    assert spec_of(v5) == spec
    assert spec_of(family("qwen3_moe").write_config(spec)) == spec


@pytest.mark.parametrize("step, dense", [(1, []), (2, []), (2, [1]), (3, [5, 2])])
def test_moe_layers_are_those_of_transformers(step, dense):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = V4 | dict(num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=dense)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{k: v for k, v in config.items() if k != "transformers_version"}))
    expected = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert spec_of(config).moe_layers == expected
    assert spec_of(family("qwen3_moe").write_config(spec_of(config))).moe_layers == expected


REFUSED = {
    "model_type": "bert",
    "architectures": ["Qwen3MoeForSequenceClassification"],
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6},
    "partial_rotary_factor": 0.5,
    "rope_theta": -1.0,
    "num_experts": 4,
    "num_local_experts": 64,
    "num_key_value_heads": 5,
    "hidden_size": "2048",
    "num_hidden_layers": True,
    "norm_topk_prob": "yes",
    "tie_word_embeddings": 1,
    "mlp_only_layers": [48],
    "decoder_sparse_step": 0,
    "quantization_config": {"quant_method": "fp8"},
    "final_logit_softcapping": 30.0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_numbers_is_refused_by_name(key):
    named = {"num_experts": "num_experts_per_tok"}.get(key, key)
    with pytest.raises(BadInput, match=named) as caught:
        spec_of(V4 | {key: REFUSED[key]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts_per_tok", "vocab_size"])
def test_missing_shape_is_refused_by_name(key):
    with pytest.raises(BadInput, match=f"{key} is missing"):
        spec_of({k: v for k, v in V4.items() if k != key})


def test_absent_keys_mean_what_transformers_assumes():
    from transformers import Qwen3Config, Qwen3MoeConfig

    optional = ("rope_theta", "norm_topk_prob", "tie_word_embeddings", "rms_norm_eps", "decoder_sparse_step")
    bare = {k: v for k, v in V4.items() if k not in optional}
    assumed = Qwen3MoeConfig(**{k: v for k, v in bare.items() if k != "transformers_version"}).to_dict()
    assert spec_of(bare) == spec_of(assumed)
    moe_only = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "mlp_only_layers",
        "output_router_logits",
    )
    dense = {k: v for k, v in bare.items() if k not in (*moe_only, "head_dim", "router_aux_loss_coef")}
    dense |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assumed = Qwen3Config(
        **{k: v for k, v in dense.items() if k not in ("transformers_version", "model_type")}
    ).to_dict()
    assert spec_of(dense) == spec_of(assumed)


# -- damaged checkpoints -------------------------------------------------------------------------------------------


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors.*truncated"


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    return "model.safetensors.*not a safetensors"


def no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "only safetensors"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def missing_expert(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    return "layers.1.mlp.experts.7.up_proj.weight is missing"


def wrong_shape(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    return r"model.norm.weight has shape \[65\].*\[64\]"


def extra_bias(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}))
    return "q_proj.bias belongs to no part"


def quantised(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    return "stored as I8"


def lost_part(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
    return "tensor .* is missing|model-1.safetensors: no such file"


def not_a_number(folder):
    rewrite(folder, lambda t: t["model.layers.2.mlp.experts.3.down_proj.weight"][1].fill_(float("nan")))
    return "layers.2.mlp.experts.3.down_proj.weight holds a nan"


def two_parts(folder, change):
    """As two files and an index, after `change(first, second, weight_map)`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a": dict.fromkeys(names[::2]), "b": dict.fromkeys(names[1::2])}
    weight_map = {name: f"{part}.safetensors" for part, of in parts.items() for name in of}
    change(parts["a"], parts["b"], weight_map)
    for part, of in parts.items():
        save_file({name: tensors[name] for name in of}, folder / f"{part}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}  # a wrong size harms nobody
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lying_index(folder):
    two_parts(folder, lambda a, b, weight_map: weight_map.update({"model.norm.weight": "b.safetensors"}))
    return "b.safetensors: no tensor model.norm.weight, though .* names it .it is in a.safetensors"


def twice(folder):
    two_parts(folder, lambda a, b, weight_map: b.update({"model.norm.weight": None}))
    return "model.norm.weight is in a.safetensors and in b.safetensors"


def two_sets(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "kept")
    two_parts(folder, lambda a, b, weight_map: None)
    (folder / "kept").rename(folder / "model.safetensors")
    return "two sets of weights"


def unknown_encoding(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    return "quant_method='awq'"


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json: no such file"


def bad_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json: not readable as JSON"


DAMAGES = [
    truncate,
    garbage,
    no_weights,
    missing_expert,
    wrong_shape,
    extra_bias,
    quantised,
    lost_part,
    not_a_number,
    lying_index,
    twice,
    two_sets,
    unknown_encoding,
    no_config,
    bad_config,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_checkpoints_are_bad_input_in_one_line(damage, checkpoint, mesh, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    message = damage(folder)
    with pytest.raises(BadInput, match=message) as caught:
        build(folder, mesh)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_validation_asks_for_the_tokenizer(checkpoint):
    with pytest.raises(BadInput, match="tokenizer_config.json is missing"):
        validate_folder(checkpoint)


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16},
    "yarn-own-context": {"rope_type": "yarn", "factor": 4.0},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "truncate": False},
    "yarn-deepseek": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "yarn-given": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("form", [4, 5])
def test_rotary_frequencies_are_those_of_transformers(name, form):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    from megarl.models.rope import tables

    given = {"rope_theta": 30_000.0, "rope_type": "default", **ROPES[name]}
    shape = dict(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    shape |= dict(num_key_value_heads=1, head_dim=64, max_position_embeddings=512, rope_parameters=given)
    config = Qwen3Config(**shape).to_dict()
    if form == 4:
        scaling = {key: value for key, value in given.items() if key != "rope_theta"}
        config |= {"rope_parameters": None, "rope_theta": 30_000.0, "rope_scaling": scaling}
    spec = spec_of(config)
    positions = torch.arange(600)
    expected = Qwen3RotaryEmbedding(Qwen3Config(**shape))(torch.zeros(1), positions[None])
    for found, wanted in zip(tables(spec.rope, positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(found, wanted[0], rtol=0, atol=2e-5)
    assert spec_of(family("qwen3").write_config(spec)) == spec
