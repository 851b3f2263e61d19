"""What load_config promises: a mistake is one line with key, value and remedy, the rest survives a round trip."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import (
    Config,
    Section,
    check_config,
    check_world,
    describe,
    dump_config,
    load_config,
    resolve,
    smallest_world,
)
from megarl.config.check import REWARD_TYPES
from megarl.errors import BadInput

SOURCE = {"type": "reasoning_gym", "task": "chain_sum"}
BASE = {
    "run_dir": "runs/t",
    "model": {"path": "no/such/model", "generate": {"seed": 1}},
    "sft": {"data": [SOURCE]},
    "reward_model": {"data": [SOURCE]},
    "rl": {"data": [SOURCE], "algorithm": {"preset": "gspo", "gate": {"low": 3e-4, "high": 4e-4}}},
    "eval": {"data": [SOURCE | {"seed": 9}]},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(BASE))
    return file


def refused(path: Path, *overrides: str, require=None) -> str:
    with pytest.raises(BadInput) as info:
        load_config(path, overrides, require=require)
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rl.stepz=7", ["rl.stepz = 7", "did you mean rl.steps?"]),
        ("rl.data.0.tsk=x", ["rl.data.0.tsk", "did you mean rl.data.0.task?"]),
        ("rl.algorithm.gates.high=1", ["rl.algorithm.gates", "did you mean rl.algorithm.gate?"]),
        ("tp=2", ["tp = 2", "did you mean parallel.tp?"]),
        ("rl.steps=many", ["rl.steps", '"many"', "valid integer"]),
        ("rl.steps=true", ["rl.steps = true", "valid integer"]),
        ("rl.steps=0", ["rl.steps = 0", "greater than 0"]),
        ("rl.optimizer.lr=.inf", ["rl.optimizer.lr", "finite"]),
        ("rl.algorithm.ratio=[token]", ["rl.algorithm.ratio", "valid string"]),
        ("rl.algorithm.kl.coef=-1", ["rl.algorithm.kl.coef = -1", "greater than or equal to 0"]),
        ("rl.algorithm.kl.weight=1", ["rl.algorithm.kl.weight = 1"]),
        ("rl.algorithm.veto=1", ["rl.algorithm.veto = 1", "less than 1"]),
        ("rl.algorithm.fixed_length=0", ["rl.algorithm.fixed_length = 0", "greater than 0"]),
        ("sft=off", ["sft = false", "none", "YAML reads off"]),
        ("parallel.tp=3", ["parallel.tp = 3", "8 attention heads", "nearest that work: tp=4, tp=2, tp=1"]),
        ("parallel.ep=3", ["parallel.ep = 3", "8 experts", "nearest that work: ep=4, ep=2, ep=1"]),
        ("parallel.etp=3", ["parallel.etp = 3", "64 expert", "nearest that work: etp=4, etp=2, etp=1"]),
        ("parallel.pp=3", ["parallel.pp = 3", "4 layers", "nearest that work: pp=4, pp=2, pp=1"]),
        ("parallel.vpp=2", ["parallel.vpp = 2", "need a pipeline", "nearest that work: vpp=none, pp=2 vpp=2"]),
        ("model.layers=te", ["model.layers = 'te'", "set model.layers: torch"]),
        (
            "rollout.tensor_parallel=3",
            ["rollout.tensor_parallel = 3", "rollout.tensor_parallel=4, rollout.tensor_parallel=2"],
        ),
        (
            "rollout.fp8=blockwise",
            ["rollout.fp8 = 'blockwise': num_key_value_heads x head_dim = 64 is no multiple of 128", "set rollout.fp8: none"],
        ),
        ("rollout.fp8=delayed", ["rollout.fp8", "'none' or 'blockwise'"]),
        ("rl.optimizer_steps_per_rollout=3", ["= 3", "128 sequences", "set 2"]),
        ("rollout.max_response_tokens=512", ["= 512", "context of 512"]),
        ("rl.max_prompt_tokens=500", ["rl.max_prompt_tokens = 500", "set at most 448"]),
        ("rl.micro_batch_tokens=32", ["rl.micro_batch_tokens = 32", "set at least 65"]),
        ("rollout.max_context=1000", ["rollout.max_context = 1000", "512"]),
        ("sft.max_tokens=513", ["sft.max_tokens = 513", "512"]),
        ("sft.validate_every=5", ["sft.validate_every = 5", "sft.validation"]),
        ("reward_model.data=[]", ["reward_model.data = []", "add a data source"]),
        ("reward_model.data=[{type: jsonl}]", ["reward_model.data", "without a path"]),
        ("reward_model.validate_every=5", ["reward_model.validate_every = 5", "reward_model.validation"]),
        ("reward_model.max_tokens=513", ["reward_model.max_tokens = 513", "512"]),
        ("reward_model={data: [{type: jsonl, path: x}], max_tokens: 300, micro_batch_tokens: 512}", ["pair", "600"]),
        ("reward_model.optimizer.betas=[0.9,1.0]", ["reward_model.optimizer.betas", "below 1"]),
        ("reward.type=model", ["eval.data", "reward = none", "'model'", "none yet"]),
        ("reward.type=exact", ["reward.type = 'exact'", "exact_match"]),
        ("rl.data.0.reward=judge", ["'judge'", "reward.named"]),
        ("rl.data.0.type=jsonl", ["rl.data", "without a path"]),
        ("rl.data.3.size=1", ["rl.data.3.size=1"]),
        ("rl.steps", ["rl.steps=20"]),
        ("rl.optimizer.betas=[0.9,1.0]", ["rl.optimizer.betas", "below 1"]),
        ("sft.optimizer.type=lion", ["sft.optimizer.type", "lion"]),
        ("rl.optimizer.type=muon", ["rl.optimizer.type = 'muon'", "emerging_optimizers 0.1", "set adam or sgd"]),
        ("rl.optimizer.implementation=te", ["= 'te'", "Transformer Engine is not installed", "set auto or fused"]),
        ("rl.critic.optimizer.implementation=apex", ["rl.critic.optimizer", "NVIDIA Apex is not installed"]),
        ("sft.optimizer={type: sgd, implementation: foreach}", ["sft.optimizer.implementation = 'foreach'", "'sgd'"]),
        ("rl.optimizer={type: sgd, cpu_offload: true}", ["rl.optimizer.cpu_offload = true", "for Adam"]),
        ("rl.optimizer={cpu_offload: true, decoupled_weight_decay: false}", ["cpu_offload = true", "decoupled_weight_decay"]),
        ("rl.optimizer={cpu_offload: true, implementation: for-loop}", ["cpu_offload = true", "implementation: auto"]),
        ("memory.sleep_level=3", ["memory.sleep_level = 3"]),
        ("seed=${no.such}", ["no.such"]),
        ("model.generate={family: qwen3}", []),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_remedy(base: Path, override: str, parts: list[str]) -> None:
    if not parts:
        assert load_config(base, [override]).model.generate.family == "qwen3"
        return
    message = refused(base, override)
    assert all(part in message for part in parts), message


def test_an_offloaded_optimizer_needs_the_distributed_one(base: Path) -> None:
    offload = "rl.optimizer.cpu_offload=true"
    assert "set parallel.distributed_optimizer: true" in refused(base, offload, "parallel.distributed_optimizer=false")
    assert "set model.dtype: float32 or bfloat16" in refused(base, offload, "model.dtype=float64")
    assert load_config(base, [offload]).rl.optimizer.cpu_offload


def test_a_package_called_apex_that_is_not_nvidias_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "is not NVIDIA's" in refused(base, "rl.optimizer.implementation=apex")
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").touch()
    load_config(base, ["rl.optimizer.implementation=apex"])
    message = refused(base, "rl.optimizer.implementation=apex", "rl.critic.optimizer.implementation=fused")
    assert message.startswith("rl.critic.optimizer.implementation = 'fused': rl.optimizer.implementation is 'apex'")


def test_a_head_below_the_model_is_refused(base: Path) -> None:
    assert "set model.head_dtype: none" in refused(base, "model.head_dtype=float32", "model.dtype=float64")


def test_dense_models_have_no_expert_parallelism(base: Path) -> None:
    assert "nearest that work: ep=1" in refused(base, "model.generate.family=qwen3", "parallel.ep=2")
    assert "intermediate" in refused(
        base, "model.generate.family=qwen3", "model.generate.intermediate_size=255", "parallel.tp=2"
    )


def test_sections_are_required_by_the_command_that_reads_them(base: Path) -> None:
    assert refused(base, "sft=none", require="sft").startswith("sft: missing")
    assert refused(base, "reward_model=none", require="reward_model").startswith("reward_model: missing")
    assert refused(base, "rl=none", require="rl").startswith("rl: missing")
    assert "eval.data" in refused(base, "eval.data=[]", require="eval")
    assert "eval.every" in refused(base, "eval.data=[]", "eval.every=5")
    assert "model.path" in refused(base, "model.generate=none", require="rl")
    assert load_config(base, ["model.generate=none"]).model.generate is None
    assert "no such file" in refused(base, "rl.data=[{type: jsonl, path: no.jsonl}]", require="rl")
    load_config(base, ["rl.data=[{type: jsonl, path: no.jsonl}]"], require="sft")


def test_rl_needs_the_reward_models_that_it_names(base: Path, tmp_path: Path) -> None:
    named = f"{{right: {{}}, quality: {{type: model, params: {{path: {tmp_path}}}}}}}"
    weighted = ["reward.type=weighted", "reward.params={weights: {right: 1, quality: 0.1}}", f"reward.named={named}"]
    weighted += ["eval.data.0.reward=right"]
    message = refused(base, *weighted, require="rl")
    assert f"reward.named.quality.params.path = '{tmp_path}'" in message and "megarl reward-model writes" in message
    load_config(base, weighted, require="reward_model")  # it may be what this command is about to make
    shape = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 4, "max_position_embeddings": 128, "architectures": ["Qwen3ForCausalLM"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert "['Qwen3ForCausalLM'] is not a reward model" in refused(base, *weighted, require="rl")
    shape["architectures"] = ["Qwen3ForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert load_config(base, [*weighted, "parallel.ep=2"], require="rl")  # a dense one beside experts
    line = refused(base, *weighted, "parallel.pp=4", require="rl")
    assert "parallel.pp = 4" in line and "the reward model's 6 layers" in line
    assert "eval.data: reward = quality" in refused(base, *weighted, "eval.data.0.reward=quality")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "cannot be read" in refused(tmp_path)
    for text, part in [
        ("a: 1\nb: c: d\n", "bad.yaml:2: not valid YAML"),
        ("x: 1\nx: 2\n", "duplicate"),
        ("- 1\n", "key: value"),
        ("", "model: missing"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        assert part in refused(tmp_path / "bad.yaml")


def test_a_path_that_no_file_system_has_is_refused(base: Path) -> None:
    line = refused(base, f"model.path={'a' * 5000}")
    assert "File name too long; set another path" in line and len(line) < 200


@pytest.mark.parametrize("setting", ["tp", "pp", "ep", "etp", "cp"])
def test_a_degree_of_billions_is_refused_as_fast_as_any(base: Path, setting: str) -> None:
    tracemalloc.start()
    assert f"parallel.{setting} = 2147483648" in refused(base, f"parallel.{setting}=2147483648")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_config_json_wins_over_nothing_and_must_agree_with_generate(base: Path, tmp_path: Path) -> None:
    shape = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 4, "max_position_embeddings": 128, "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 32}  # fmt: skip
    file = tmp_path / "config.json"
    here = [f"model.path={tmp_path}", "model.generate=none"]
    file.write_text(json.dumps(shape))
    load_config(base, [*here, "parallel.pp=3", "parallel.tp=4"], require="rl")
    assert "4 experts" in refused(base, *here, "parallel.ep=8")
    assert "hidden_size = 64" in refused(base, f"model.path={tmp_path}")
    file.write_text(json.dumps(shape | {"model_type": "bert"}))
    assert "model_type = 'bert' is not supported; use one of qwen3_moe" in refused(base, *here)
    file.write_text(json.dumps(shape)[:40])
    assert "not readable as JSON" in refused(base, *here)
    file.write_text(json.dumps(shape | {"num_experts": None}))
    assert "num_experts = None" in refused(base, *here)


def test_a_section_given_in_part_keeps_the_defaults_of_its_place(base: Path) -> None:
    optimizer = load_config(base, ["sft.optimizer.lr=0.5"]).sft.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps) == (0.5, "cosine", 10)
    assert load_config(base, ["rl.optimizer.lr=0.5"]).rl.optimizer.schedule == "constant"


def test_none_unsets_only_what_may_be_unset_and_has_no_such_value(base: Path) -> None:
    algorithm = load_config(base, ["rl.algorithm.kl=none", "rl.algorithm.ratio=none"]).rl.algorithm
    assert algorithm.kl is None and algorithm.ratio == "none"
    assert "valid integer" in refused(base, "seed=none")


def test_rl_algorithm_takes_any_axis_from_the_file_and_from_overrides(base: Path) -> None:
    from megarl.algorithms import PRESETS, check, from_config

    def algorithm(*overrides: str) -> dict[str, Any]:
        found = from_config(load_config(base, overrides).rl.algorithm)
        return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}

    gspo = {f.name: getattr(PRESETS["gspo"], f.name) for f in dataclasses.fields(PRESETS["gspo"])}
    assert algorithm() == gspo
    assert repr(algorithm("rl.algorithm.gate.high=2e-3")["gate"]) == "clip(low=0.0003, high=0.002, dual=None)"
    assert repr(algorithm("rl.algorithm.gate={type: soft, tau_pos: 2}")["gate"]) == "soft(tau_pos=2, tau_neg=1.05)"
    changed = {"ratio": "token", "n_seq": "valid"}
    assert algorithm("rl.algorithm.ratio=token", "rl.algorithm.n_seq=valid") == gspo | changed
    assert algorithm("rl.algorithm.kl.coef=0.1")["kl"].coef == 0.1
    assert algorithm("rl.algorithm.correction={level: token, mode: mask, low: 0.5}")["correction"].low == 0.5
    assert algorithm("rl.algorithm.filter.type=dynamic-sampling")["filter"].type == "dynamic-sampling"
    assert algorithm("rl.algorithm={preset: dapo, filter: {type: none}}")["filter"] is None
    refused = load_config(base, ["rl.algorithm.gate.hihg=1"]).rl.algorithm
    assert check(refused) == "gate clip has no setting hihg; it has: low, high, dual"


def test_interpolation_and_environment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_TEST_DIR", "/somewhere")
    config = load_config(base, ["rl.steps=30", "eval.every=${rl.steps}", "run_dir=${oc.env:MEGARL_TEST_DIR}/x"])
    assert config.eval.every == 30 and config.run_dir == "/somewhere/x"


def test_origins_and_description_cover_every_field(base: Path, tmp_path: Path) -> None:
    resolved = resolve(base, ["rl.steps=7", "rl.data.0.size=6", "parallel={ep: 2}"])
    lines = {line.split("#")[0].strip(): line for line in describe(resolved)}
    assert "[override] Rollout steps" in lines["steps: 7"]
    assert "[override]" in lines["size: 6"] and "[override]" in lines["ep: 2"]
    assert "[file]" in lines['task: "chain_sum"'] and "[default]" in lines["prompts_per_step: 16"]
    assert all("#" in line and line.split("#")[1].strip() for line in lines.values() if ":" in line)
    file = tmp_path / "described.yaml"
    file.write_text("\n".join(describe(resolved)))
    assert load_config(file) == resolved.config


def test_configuration_is_frozen_and_every_field_documented(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 2
    for kind in Section.__subclasses__():
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name} has no docstring"


def test_no_torch_is_imported() -> None:
    code = "import megarl.config, megarl.cli, megarl.launcher, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_reward_types_are_the_registry_s() -> None:
    from megarl.rewards import MODEL, WEIGHTED
    from megarl.rewards.functions import BUILT_IN

    assert set(REWARD_TYPES) == set(BUILT_IN) | {MODEL, WEIGHTED}


degrees = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=30, deadline=None)
@given(tp=degrees, pp=degrees, ep=degrees, etp=degrees, engine=degrees)
def test_smallest_world_is_the_first_that_every_group_divides(tp: int, pp: int, ep: int, etp: int, engine: int) -> None:
    config = Config(
        model={"path": "x"}, parallel=dict(tp=tp, pp=pp, ep=ep, etp=etp), rollout={"tensor_parallel": engine}
    )
    fits = [w for w in range(1, 5000) if w % (tp * pp) == 0 and w % (etp * ep * pp) == 0 and w % engine == 0]
    assert smallest_world(config) == fits[0]
    for world in (1, 12, 30, *fits[:2]):
        if world in fits:
            check_world(config, world)
        else:
            with pytest.raises(BadInput, match=f"world size {world}: not a multiple of {fits[0]}"):
                check_world(config, world)


LONG = ["model.generate.context=64", "rollout.max_response_tokens=16", "rl.max_prompt_tokens=16"]
QWEN3 = ["model.generate.family=qwen3"]
REFUSED = {  # settings -> what is said about them
    ("parallel.tp=3",): "parallel.tp = 3: does not divide the model's 8 attention heads",
    ("model.generate.num_heads=12", "model.generate.num_kv_heads=6", "parallel.tp=4"): "does not divide the model's 6 key",
    (*QWEN3, "model.generate.intermediate_size=255", "parallel.tp=2"): "parallel.tp = 2: does not divide the model's 255 in",
    ("parallel.ep=3",): "parallel.ep = 3: does not divide the model's 8 experts",
    ("parallel.ep=16",): "parallel.ep = 16: does not divide the model's 8 experts",
    ("parallel.etp=3",): "parallel.etp = 3: does not divide the model's 64 expert intermediate columns",
    (*QWEN3, "parallel.ep=2"): "parallel.ep = 2: a dense model has no experts",
    (*QWEN3, "parallel.etp=2"): "parallel.etp = 2: a dense model has no experts",
    ("parallel.pp=3",): "parallel.pp = 3, vpp = 1: 3 stages do not divide the model's 4 layers",
    ("parallel.pp=2", "parallel.vpp=3"): "parallel.pp = 2, vpp = 3: 6 stages do not divide the model's 4 layers",
    ("parallel.vpp=2",): "parallel.vpp = 2: virtual stages need a pipeline",
    ("parallel.first_stage_layers=2",): "parallel.first_stage_layers = 2: there is one stage",
    ("parallel.pp=2", "parallel.first_stage_layers=4"): "parallel.first_stage_layers = 4: leaves 0 of the model's 4 layers",
    ("parallel.pp=3", "parallel.last_stage_layers=1"): "parallel.last_stage_layers = 1: leaves 3 of the model's 4 layers",
    ("parallel.pp=2", "parallel.first_stage_layers=1", "parallel.last_stage_layers=1"): "leaves 2 of the model's 4 layers to 0",
    ("parallel.pp=2", "parallel.vpp=2", "parallel.first_stage_layers=2"): "not with virtual stages",
    ("parallel.pp=2", "parallel.loss_in_split=true", "parallel.last_stage_layers=1"): "not with embedding_in_split or loss_in",
    ("parallel.pp=2", "parallel.embedding_in_split=true"): "do not divide the model's 4 layers + 1 (embedding_in_split)",
    ("parallel.embedding_in_split=true",): "parallel.embedding_in_split = true: there is one stage",
    ("parallel.pp=5", "parallel.loss_in_split=true"): "4 layers + 1 (loss_in_split) leave one without a layer",
    ("parallel.overlap_param_gather=true",): "parallel.overlap_param_gather = true: needs distributed_optimizer",
    ("rl.optimizer.type=sgd",): "rl.optimizer.type = sgd: the distributed optimizer",
    (*LONG, "parallel.cp=64"): "parallel.cp = 64: the sequences of sft have at most 64 tokens",
    (*LONG, "sft=none", "reward_model=none", "parallel.cp=32"): "the sequences of rl have at most 32 tokens and are cut into",
    (*LONG, "rl.micro_batch_tokens=34", "parallel.cp=9"): "rl.micro_batch_tokens = 34: cp = 9 and tp = 1 pad 32 tokens",
    ("sft.max_tokens=65", "sft.micro_batch_tokens=65", "parallel.tp=2"): "sft.micro_batch_tokens = 65: cp = 1 and tp = 2 pad 65",
    ("parallel.tp=2", "parallel.pp=2", "parallel.nproc=6"): "world size 6: not a multiple of 4",
    ("parallel.pp=2", "parallel.ep=4", "parallel.nproc=4"): "world size 4: not a multiple of 8",
    ("rollout.tensor_parallel=2", "parallel.nproc=3"): "world size 3: not a multiple of 2",
    ("parallel.nproc=64",): "rl.prompts_per_step = 16: 32 sequences per optimizer step for 64 data-parallel ranks",
    ("sft.batch_size=2", "parallel.nproc=4"): "sft.batch_size = 2: below the 4 data-parallel ranks",
    ("rollout.tensor_parallel=3",): "rollout.tensor_parallel = 3: does not divide the model's 8 attention heads",
    ("model.generate.num_kv_heads=4", "model.generate.num_heads=24", "rollout.tensor_parallel=6"): "4 key/value heads",
    (*QWEN3, "model.generate.intermediate_size=258", "rollout.tensor_parallel=4"): "258 intermediate columns",
    ("model.generate.moe_intermediate_size=66", "rollout.tensor_parallel=4"): "66 expert columns",
    ("rollout.data_parallel=2",): "rollout.data_parallel = 2: replicas step together only to share experts",
    ("rollout.expert_parallel=true",): "rollout.expert_parallel = true: an engine of one rank",
    ("rollout.expert_parallel=true", "rollout.data_parallel=9"): "an engine of 9 ranks (tensor_parallel x data_parallel)",
    (*QWEN3, "rollout.expert_parallel=true", "rollout.tensor_parallel=2"): "expert_parallel = true: a dense model has no",
    ("parallel.tp=3", "parallel.pp=3", "rollout.tensor_parallel=3"): "parallel.tp = 3: does not divide",
}  # fmt: skip


def suggestions(message: str) -> list[list[str]]:
    """The layouts that a refusal names, as overrides."""
    listed = message.partition("; nearest that work: ")[2]
    return [
        [setting if "." in setting.partition("=")[0] else f"parallel.{setting}" for setting in layout.split()]
        for layout in listed.split(", ")
        if layout
    ]


@pytest.mark.parametrize("settings", REFUSED, ids=" ".join)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest_that_can(base: Path, settings: tuple[str, ...]) -> None:
    message = refused(base, *settings)
    assert REFUSED[settings] in message
    found = suggestions(message)
    assert 1 <= len(found) <= 3 and len({tuple(layout) for layout in found}) == len(found), message
    for layout in found:
        load_config(base, [*settings, *layout])


@pytest.mark.parametrize(
    ("setting", "require", "said"),
    [
        ("seed=1", "routing", "a dense model routes nothing; verify routing needs a mixture of experts"),
        ("rl.routing_replay=old", "rl", "rl.routing_replay = 'old': a dense model has no experts"),
        ("rl.routing_replay=rollout", "rl", "rl.routing_replay = 'rollout': a dense model has no experts"),
        ("rollout.routed_experts=true", "rl", "rollout.routed_experts = true: a dense model has no experts"),
        ("model.dtype=float64", "routing", "vLLM has no float64 kernels"),
    ],
)
def test_a_dense_model_has_no_routing(base: Path, setting: str, require: str, said: str) -> None:
    assert said in refused(base, *QWEN3, setting, require=require)


def test_the_nearest_layouts_are_near(base: Path) -> None:
    """One change where one is enough, the world's size kept where it can be, and nothing switched on without need."""
    assert suggestions(refused(base, "parallel.tp=3", "parallel.ep=2"))[0] == ["parallel.tp=4", "parallel.ep=2"]
    assert suggestions(refused(base, "parallel.tp=2", "parallel.pp=3", "parallel.nproc=8")) == [
        ["parallel.tp=2", "parallel.pp=4"], ["parallel.tp=2", "parallel.pp=2"], ["parallel.tp=2", "parallel.pp=1"]
    ]  # fmt: skip
    large = ["num_layers=48", "num_experts=128", "num_heads=64", "num_kv_heads=4", "moe_intermediate_size=768"]
    wanted = ["tp=8", "pp=5", "vpp=7", "ep=24", "etp=5", "cp=3"]
    layouts = [f"model.generate.{setting}" for setting in large] + [f"parallel.{setting}" for setting in wanted]
    found = suggestions(refused(base, *layouts))
    assert found and all("parallel.cp=3" in layout for layout in found)
    for layout in found:
        load_config(base, [*layouts, *layout])


def test_a_layout_that_no_setting_saves_says_so(base: Path) -> None:
    message = refused(base, "parallel.nproc=200")
    assert "set at least 200" in message and message.endswith("none near these works")


def test_the_world_that_the_command_line_asks_for_is_checked_with_the_model(base: Path) -> None:
    config = load_config(base, ["parallel.tp=2", "parallel.pp=2"])
    with pytest.raises(
        BadInput, match="world size 6: not a multiple of 4.*set parallel.nproc .or --nproc. to 4"
    ) as info:
        check_world(config, 6)
    for layout in suggestions(str(info.value)):
        check_world(load_config(base, layout), 6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_accepted_layout_divides_and_any_refusal_names_layouts_that_are_accepted(data: st.DataObject) -> None:
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    shape = dict(num_heads=draw(4, 6, 8), num_kv_heads=draw(1, 2, 4), num_layers=draw(2, 4, 6),
                 num_experts=draw(4, 6, 8), moe_intermediate_size=draw(48, 64))  # fmt: skip
    parallel = dict(tp=draw(1, 2, 4), pp=draw(1, 2, 3), vpp=draw(None, 1, 2), ep=draw(1, 2, 4), etp=draw(1, 2, 3),
                    cp=draw(1, 2, 3), nproc=draw(None, None, 4, 12), first_stage_layers=draw(None, None, 1),
                    embedding_in_split=draw(False, False, True))  # fmt: skip
    rollout = dict(tensor_parallel=draw(1, 2, 3), data_parallel=draw(1, 2), expert_parallel=draw(False, True))
    config = Config(model={"path": "x", "generate": shape}, parallel=parallel, rollout=rollout)
    p, r = config.parallel, config.rollout
    if shape["num_heads"] % shape["num_kv_heads"]:
        with pytest.raises(BadInput, match="query heads"):
            check_config(config)
        return
    layers, vpp, ends = shape["num_layers"], p.vpp or 1, [p.first_stage_layers] if p.first_stage_layers else []
    if ends:
        stages = p.pp > 1 and vpp == 1 and not p.embedding_in_split
        stages = stages and layers - 1 >= p.pp - 1 and (layers - 1) % (p.pp - 1) == 0
    else:
        extra = int(p.embedding_in_split)
        stages = (layers + extra) % (p.pp * vpp) == 0 and not (p.pp == 1 and (vpp > 1 or extra))
        stages = stages and not (extra and layers + extra == p.pp * vpp)
    engine, heads = r.tensor_parallel * r.data_parallel, shape["num_kv_heads"]
    fits = (
        shape["num_heads"] % p.tp == 0
        and 0 in (heads % p.tp, p.tp % heads)
        and stages
        and shape["num_experts"] % p.ep == shape["moe_intermediate_size"] % p.etp == 0
        and shape["num_heads"] % r.tensor_parallel == 0
        and 0 in (heads % r.tensor_parallel, r.tensor_parallel % heads)
        and (r.expert_parallel or shape["moe_intermediate_size"] % r.tensor_parallel == 0)
        and (r.expert_parallel or r.data_parallel == 1)
        and (not r.expert_parallel or 1 < engine <= shape["num_experts"])
        and (p.nproc or smallest_world(config)) % smallest_world(config) == 0
    )
    if fits:
        return check_config(config)
    with pytest.raises(BadInput) as info:
        check_config(config)
    assert "\n" not in str(info.value)
    found = suggestions(str(info.value))
    assert len(found) <= 3 and (found or str(info.value).endswith("none near these works"))
    for layout in found:
        values = {"parallel": parallel.copy(), "rollout": rollout.copy()}
        for setting in layout:
            section, _, text = setting.partition(".")
            name, _, value = text.partition("=")
            values[section][name] = (
                {"none": None, "true": True, "false": False}.get(value) if value.isalpha() else int(value)
            )
        check_config(Config(model={"path": "x", "generate": shape}, **values))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 1e3),
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1),
    every=st.integers(0, 100),
)
def test_dump_loads_back_equal(steps: int, lr: float, text: str, every: int) -> None:
    base = BASE | {"run_dir": text, "checkpoint": {"every": every}}
    base["rl"] = BASE["rl"] | {"steps": steps, "optimizer": {"lr": lr}}
    config = Config.model_validate(base)
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
