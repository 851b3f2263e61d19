"""What each rank runs for the vLLM tests: an engine on a small checkpoint, and what it did."""

from __future__ import annotations

import inspect
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarl import platform
from megarl.config.schema import Config, Generate, Model, Parallel, Rollout, Tokenizer
from megarl.errors import RunFailed
from megarl.types import Prompt

CONTEXT, VOCAB = 96, 300
CHANGED = "model.layers.0.self_attn.v_proj.weight"
SHAPE = dict(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, moe_intermediate_size=32)


def make_checkpoint(path: str, family: str = "qwen3_moe", **changes: Any) -> str:
    """A small checkpoint with every weight random, norms included, and logits far from uniform."""
    platform.setup()
    from megarl.models.generate import generate_checkpoint

    generate_checkpoint(
        path,
        Generate(
            family=family, context=CONTEXT, init_std=0.15, tokenizer=Tokenizer(vocab_size=VOCAB), **(SHAPE | changes)
        ),
    )
    file = Path(path) / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(1)
    for tensor in weights.values():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    save_file(weights, file, metadata={"format": "pt"})
    return path


def prompts(count: int, length: int = 6) -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [Prompt(f"p{i}", tuple(draw.integers(4, VOCAB, length).tolist()), None) for i in range(count)]


def start(path: str, load: bool = True, dtype: str = "float32", parallel: Parallel | None = None, **rollout: Any):
    """(engine, mesh)"""
    from megarl.parallel import Mesh
    from megarl.rollout.vllm_engine import VLLMEngine

    mesh = Mesh.build(parallel or Parallel())
    return VLLMEngine(path, Rollout(max_context=CONTEXT, **rollout), dtype, 3, mesh, load=load), mesh


def _rows(groups) -> list[dict]:
    return [
        {
            "prompt": t.prompt_ids,
            "response": t.response_ids,
            "log_probs": t.rollout_log_probs.tolist(),
            "finish": t.finish_reason,
            "version": t.policy_version.tolist(),
            "mask": t.response_mask.tolist(),
            "text": t.text,
            "routed": None if t.routed_experts is None else t.routed_experts.tolist(),
        }
        for group in groups
        for t in group.trajectories
    ]


def sampling(path: str) -> dict:
    """One engine, started without weights and given them by `load_weights`, asked for everything the tests look at."""
    from megarl.rollout.engine import Sampling

    engine, _ = start(path, load=False, routed_experts=True)
    weights = load_file(Path(path) / "model.safetensors")
    engine.load_weights(weights.items(), 7)
    some = prompts(6)
    out: dict[str, Any] = {"stop_ids": engine._stop_ids}
    out["warm"] = _rows(engine.generate(some, Sampling(4, 24, 0.7), 1))
    out["greedy"] = _rows(engine.generate(some, Sampling(1, 24, 0.0), 1))
    out["reversed"] = _rows(engine.generate(some[::-1], Sampling(4, 24, 0.7), 1))
    out["alone"] = _rows(engine.generate(some[2:3], Sampling(4, 24, 0.7), 1))
    out["next_round"] = _rows(engine.generate(some, Sampling(4, 24, 0.7), 2))
    out["no_log_probs"] = _rows(engine.generate(some, Sampling(4, 24, 0.7, log_probs=False), 1))
    many = [Prompt(f"long{i}", some[i % 6].token_ids * 14 + (4 + i,), None) for i in range(110)]
    out["chunked"] = [row["response"] for row in _rows(engine.generate(many, Sampling(1, 4, 1.0), 4))]
    out["unchunked"] = [row["response"] for row in _rows(engine.generate(many[90:], Sampling(1, 4, 1.0), 4))]
    out["first_tokens"] = [r["response"][0] for r in _rows(engine.generate(some[:1], Sampling(4000, 1, 1.0), 3))]
    sequences = [row["prompt"] + row["response"] for row in out["greedy"]]
    out["scored"] = [values.tolist() for values in engine.score(sequences)]
    changed = {name: tensor * (0.5 if name == CHANGED else 1.0) for name, tensor in weights.items()}
    engine.load_weights(changed.items(), 8)  # of the long prompts' keys and values, blocks are cached
    out["reloaded"] = _rows(engine.generate(many[90:], Sampling(1, 4, 1.0), 4))
    return out


def patches(path: str) -> dict:
    """What vLLM does to the process with and without each patch."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a world of one started by hand
        os.environ.pop(key, None)
    platform.setup()
    from megarl.platform import vllm_patches
    from megarl.rollout.engine_weights import compare_weights
    from megarl.rollout.vllm_engine import VLLMEngine

    inside: dict[str, Any] = {}
    plain_start = VLLMEngine._start

    def recording_start(self, *args):
        llm = plain_start(self, *args)
        inside.update(_process_state())
        return llm

    VLLMEngine._start = recording_start
    random.seed(11), np.random.seed(11), torch.manual_seed(11)
    before = _process_state()
    cores = sorted(os.sched_getaffinity(0))
    engine, mesh = start(path, load=False)
    after = _process_state()

    import vllm.envs
    import vllm.utils.network_utils
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.usage import usage_lib
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    kernel = inspect.getsource(cpu_moe.CPUUnquantizedExperts).partition("def apply(")[2]
    shared_name = inspect.getsource(cpu_communicator._CPUSHMDistributed).partition("def make_group_name(")[2]
    plain = {key: os.environ.pop(key) for key in vllm_patches.environment()}
    defaults = {
        key: str(vllm.envs.environment_variables[key]()) for key in plain if key in vllm.envs.environment_variables
    }
    os.environ.update(plain)
    weights = load_file(Path(path) / "model.safetensors")
    other = {name: torch.roll(tensor, 1, 0) if ".experts." in name else tensor for name, tensor in weights.items()}
    engine.load_weights(weights.items(), 1)

    def differing(expected) -> list[str]:
        found = compare_weights(engine.model, engine.vllm_config, expected.items())
        return sorted({str(item.family) for item in found if item.differs})

    synced = differing(weights)
    engine._runner.reload_weights(weights_iterator=iter(other.items()))
    unpatched = differing(other)
    vllm_patches.load_weights(engine._runner, None, other.items())
    patched = differing(other)
    engine.load_weights(weights.items(), 2)
    direct = differing(weights)
    engine.load_weights(((n, t) for n, t in weights.items() if "layers.1." not in n), 3)
    partly = engine.score([[5, 6, 7]])[0].tolist()
    return {
        "before": before,
        "inside": inside,
        "after": after,
        "cores": [cores, sorted(os.sched_getaffinity(0))],
        "defaults": defaults,
        "client": type(engine._llm.llm_engine.engine_core).__name__,
        "usage_stats": usage_lib.is_usage_stats_enabled(),
        "ip": vllm.utils.network_utils.get_ip(),
        "compiles": "@torch.compile" in inspect.getsource(topk_topp_sampler),
        "rewinds": ".set_offset(" in inspect.getsource(GPUModelRunner._bookkeeping_sync),
        "uses_expert_map": kernel.count("expert_map") > 1,  # more than as a parameter
        "gathers_uneven": "def all_gatherv" in inspect.getsource(cpu_communicator.CpuCommunicator),
        "names_the_job": "MASTER_PORT" in shared_name.partition("    def ")[0],
        "dynamo_disabled": torch._dynamo.config.disable,
        "dynamo_frames": int(torch._dynamo.utils.counters["frames"]["total"]),
        "synced": synced,
        "unpatched": unpatched,
        "patched": patched,
        "direct": direct,
        "places": sorted(engine._direct.places) == sorted(weights),
        "unknown": _unknown(engine),
        "refusals": [_refusal(engine, tensors) for tensors in _bad_streams(weights)],
        "norms": _norms(),
        "partly": partly,
    }


def _process_state() -> dict:
    def peek(draw):  # the next number a generator would give, without advancing it
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        value = draw()
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
        return value

    return {
        "random": peek(random.random),
        "numpy": peek(np.random.random),
        "torch": peek(lambda: torch.rand(1).item()),
        "threads": torch.get_num_threads(),
        "set_threads": torch.set_num_threads.__name__,
        "stream": torch.cuda.Stream.__module__,
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE"),
        "LD_PRELOAD": os.environ.get("LD_PRELOAD"),
    }


def sync(
    path: str,
    dtype: str = "float32",
    learner: str | None = None,
    rollout: dict[str, Any] = {},
    ways: bool = False,
    **degrees,
) -> dict:
    """Syncs a learner into an engine started without weights, whole and then broken in several ways.

    `dtype` is the engine's, and the learner's unless that is given. `ways`: also without shared memory, by vLLM's own
    reload, and with a stale prefix cache and other faults on the way.
    """
    platform.setup()
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.rollout.weight_sync import WeightSync, check_checksums, check_sync, default_threshold, make_probes

    parallel = Parallel(**degrees)
    engine, mesh = start(path, load=False, dtype=dtype, parallel=parallel, **rollout)
    learner = learner or dtype
    policy = Policy.from_hf(path, Config(model=Model(path=path, dtype=learner), parallel=parallel), mesh)
    spec, weight_sync = policy.spec, WeightSync(policy.spec, parallel, mesh, engine)
    plan = weight_sync.plan
    probes = make_probes(spec.vocab_size, 4, engine.probe_length)
    expected = probe_log_probs(policy, probes)

    def stream():
        return weight_sync.stream(policy.modules)

    def check() -> list[float] | str:
        engine.reset_prefix_cache()  # what an earlier check left
        try:
            gap = check_sync(weight_sync, policy.modules, probes, expected, default_threshold(learner, dtype))
        except RunFailed as error:
            return str(error)
        return [gap.mean, gap.max]

    def sums() -> str:
        try:
            check_checksums(weight_sync, policy.modules)
        except RunFailed as error:
            return str(error)
        return "equal"

    out: dict[str, Any] = {"unsynced": check()}
    weight_sync.run(policy.modules, policy_version=4)  # what it maps of other ranks is not new memory
    with _LiveBytes() as live:
        report = weight_sync.run(policy.modules, policy_version=5)
    out |= {"bytes": plan.bytes, "traffic": asdict(report.traffic), "reload": engine.reload_reason}
    out |= {"version": engine.policy_version, "synced": check()}
    exchange = weight_sync.exchange
    window = 0 if exchange.mapped else exchange.shared.windows[mesh.rank].nbytes  # takes no memory before it is used
    out |= {"peak_copies": live.peak + window, "largest_layer": plan.largest_layer_bytes}
    out["sums"] = {"synced": sums()}
    for name, broken in BROKEN.items():
        weights = {name: tensor.clone() for name, tensor in stream()}
        engine.load_weights(broken(weights).items(), 6)
        out[name] = check()
        out["sums"][name] = sums()
        engine.load_weights(stream(), 7)
    out["mended"] = check()
    if ways:
        out |= _other_ways(weight_sync, policy, parallel, check)
    exact = expected
    expected = [values + (np.arange(len(values)) > len(values) - 4) for values in exact]
    out["few_tokens"] = check()
    expected = [values + 1.0 for values in exact]
    out["all_tokens"] = check()
    expected = exact
    for chunk in policy.modules:
        for parameter in chunk.parameters():
            parameter.data.mul_(1.03)
    out["stale"] = check() if (expected := probe_log_probs(policy, probes)) else ""
    try:
        short = ((name, tensor) for name, tensor in stream() if ".layers.2." not in name)
        engine.load_weights(plan.follow(short), 8)
        out["short_stream"] = "accepted"
    except RunFailed as error:
        out["short_stream"] = str(error)
    return out


def _other_ways(weight_sync: Any, policy: Any, parallel: Parallel, check: Any) -> dict:
    """The same sync over other paths, each into an engine with wrong weights; and syncs that go wrong on the way."""
    from megarl.plan.engine import buffer_bytes, weight_bytes
    from megarl.platform.shared_memory import SharedWindows
    from megarl.platform.vllm_direct import Direct
    from megarl.rollout import exchange
    from megarl.rollout.weight_sync import WeightSync, check_prefix_cache

    engine, mesh, out = weight_sync.engine, weight_sync.mesh, {}

    def attempt(action: Any) -> str:
        try:
            action()
        except RunFailed as error:
            return str(error)
        return "accepted"

    def spoil() -> None:
        engine.load_weights(((name, t * 1.1) for name, t in weight_sync.stream(policy.modules)), 0)

    out["in_place"] = weight_sync.exchange.mapped is not None
    plain_windows, plain_map = exchange.platform.shared_windows, exchange.platform.map_tensors
    exchange.platform.map_tensors = lambda *arguments: None
    for name, reason in (("windows", None), ("messages", None), ("reload", "it is asked for")):
        no_windows = lambda *arguments: SharedWindows({}, {}, 1.0)  # noqa: E731
        exchange.platform.shared_windows = no_windows if name == "messages" else plain_windows
        spoil()
        engine.reload_reason, direct = reason, engine._direct
        engine._direct = None if reason else direct
        other = WeightSync(policy.spec, parallel, mesh, engine)
        with _LiveBytes() as live:
            report = other.run(policy.modules, 1)
        out.setdefault("needed", {})[name] = sum(other.buffer_bytes)
        if name == "messages":
            out["planned"] = {
                "messages": buffer_bytes(other.plan, mesh.rank, is_cpu=False),
                "weights": weight_bytes(other.plan, mesh.rank, is_cpu=True),
            }
            out["weights"] = sum(engine.memory()["weights"])
        out[name] = {"gap": check(), "peak": live.peak, "traffic": asdict(report.traffic), "line": report.describe(reason)}
        engine.reload_reason, engine._direct = None, direct
    out["cut"] = attempt(lambda: _write_columns(engine))
    weight_sync.run(policy.modules, 1)
    out["parked"] = _parked(weight_sync, policy, parallel, spoil, check)
    exchange.platform.map_tensors = plain_map
    for chunk in policy.modules:  # parameters that have moved since are mapped again, not read where they were
        for parameter in chunk.parameters():
            parameter.data = parameter.data.clone()
    mesh.barrier()
    for theirs in weight_sync.exchange.mapped.others.values():
        for tensor in theirs.values():
            tensor.zero_()
    spoil()
    weight_sync.run(policy.modules, 1)
    out["moved"] = check()
    weight_sync.run(policy.modules, 2)
    engine.generate(prompts(2, 40), _sampling(), 1)
    out["stale_cache"] = attempt(lambda: check_prefix_cache(engine, mesh))
    engine.reset_prefix_cache()
    plain, skipped = Direct.write_stretches, "model.layers.1.self_attn.q_norm.weight"
    Direct.write_stretches = lambda self, stretches, values: (
        None if stretches[0].names == (skipped,) else plain(self, stretches, values)
    )
    out["skipped"] = attempt(lambda: weight_sync.run(policy.modules, 3))
    Direct.write_stretches = plain
    chunk = policy.modules[-1]
    while hasattr(chunk, "module"):
        chunk = chunk.module
    norm = chunk.decoder.final_layernorm
    norm.extra = torch.nn.Parameter(torch.zeros(2))
    out["unexpected"] = attempt(lambda: weight_sync.run(policy.modules, 4))
    del norm.extra
    norm.weight, kept = torch.nn.Parameter(torch.ones(3)), norm.weight
    out["misshapen"] = attempt(lambda: weight_sync.run(policy.modules, 4))
    norm.weight = kept
    return out


def _sampling() -> Any:
    from megarl.rollout.engine import Sampling

    return Sampling(1, 2, 1.0)


def _bad_streams(weights: dict) -> list[dict]:
    query = "model.layers.0.self_attn.q_proj.weight"
    return [{"model.layers.0.bias": weights[query]}, {query: weights[query][1:]}, {query: weights[query]}]


def _unknown(engine) -> dict:
    """Why a model with one thing that nothing is known of is not written into."""
    from megarl.platform import vllm_direct

    model, direct = engine.model, engine._direct

    def reason() -> str:
        found = vllm_direct.take_on(model, direct.hosted, direct.names)
        return found if isinstance(found, str) else "taken on"

    out = {"nothing": reason()}
    attention, experts = model.model.layers[0].self_attn, model.model.layers[1].mlp.experts.routed_experts
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    out["parameter"] = reason()
    del attention.sinks
    kernel = experts.quant_method.moe_kernel
    experts.quant_method.moe_kernel = None
    out["kernel"] = reason()
    experts.quant_method.moe_kernel = kernel
    plain = vllm_direct.pack
    vllm_direct.packs_by_matrix.cache_clear()
    vllm_direct.pack = lambda new, to, isa: to.copy_(new.flip(1))
    out["packing"] = reason()
    vllm_direct.packs_by_matrix.cache_clear()
    vllm_direct.pack = lambda *arguments: torch.ops._C.no_such_operator(*arguments)
    out["operator"] = reason()
    vllm_direct.pack = plain
    vllm_direct.packs_by_matrix.cache_clear()
    out["mapping"] = vllm_direct.take_on(model, direct.hosted | {"model.other.weight": (slice(0, 1),)}, direct.names)
    return out


def _refusal(engine, tensors: dict) -> str:
    try:
        engine.load_weights(tensors.items(), 9)
    except RunFailed as error:
        return str(error)
    return "accepted"


def _norms() -> dict:
    """vLLM's norm as patched and as it comes, on strided and plain inputs."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = RMSNorm.__new__(RMSNorm)
    torch.nn.Module.__init__(norm)
    norm.weight, norm.variance_epsilon, norm.variance_size_override = torch.nn.Parameter(torch.randn(8)), 1e-6, None
    norm.has_weight = norm.pass_weight = norm.pass_weight_add = True
    x, residual = torch.randn(5, 4, 8)[:, :3], torch.randn(5, 24).view(5, 3, 8)
    plain, added = x.contiguous(), x + residual
    gaps = [norm.forward_cpu(x) - norm.forward_native(x)]
    gaps += [a - b for a, b in zip(norm.forward_cpu(plain, residual), (norm.forward_native(added), added))]
    return {
        "is_native": "forward_native" in inspect.getsource(CustomOp.forward_cpu),
        "gap": float(torch.cat(gaps).abs().max()),
    }


def sync_twice(path: str, **degrees) -> dict:
    """A sync of the checkpoint and one of other weights: what an engine packed at its first must not survive."""
    platform.setup()
    from megarl.convert import stream_hf
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.platform import vllm_patches
    from megarl.rollout.weight_sync import WeightSync, compare_with_learner, make_probes, measure_gap

    parallel = Parallel(**degrees)
    engine, mesh = start(path, load=False, parallel=parallel)
    policy = Policy.from_hf(path, Config(model=Model(path=path), parallel=parallel), mesh)
    weight_sync, probes = WeightSync(policy.spec, parallel, mesh, engine), make_probes(policy.spec.vocab_size, 4)

    def compare() -> dict:
        found = compare_with_learner(engine, mesh, stream_hf(policy.modules, policy.spec, mesh))
        gap = measure_gap(engine, probes, probe_log_probs(policy, probes), mesh)
        return {"gap": gap.mean, "differing": [str(item) for item in found if item.differs], "families": len(found)}

    out = {}
    for name in ("first", "second"):
        weight_sync.run(policy.modules, 0)
        out[name] = compare()
        for chunk in policy.modules:
            for parameter in chunk.parameters():
                parameter.data.mul_(1.05)
    engine.reload_reason, engine._direct = "it is asked for", None
    vllm_patches._pack_tied_output = lambda model: None
    WeightSync(policy.spec, parallel, mesh, engine).run(policy.modules, 0)
    return out | {"unpatched": compare()}


def swap_experts(weights: dict) -> dict:
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        a, b = (f"model.layers.2.mlp.experts.{e}.{matrix}.weight" for e in (3, 5))
        weights[a], weights[b] = weights[b], weights[a]
    return weights


def _swap_down(weights: dict) -> dict:
    a, b = (f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (0, 7))
    weights[a], weights[b] = weights[b], weights[a]
    return weights


def _swap_halves(weights: dict) -> dict:
    """Gate and up of one expert."""
    a, b = (f"model.layers.0.mlp.experts.4.{matrix}.weight" for matrix in ("gate_proj", "up_proj"))
    weights[a], weights[b] = weights[b], weights[a]
    return weights


def _transpose(weights: dict) -> dict:
    """One expert's matrix, if it is square."""
    name = "model.layers.3.mlp.experts.1.down_proj.weight"
    weights[name] = weights[name].T.contiguous() if len(set(weights[name].shape)) == 1 else weights[name]
    return weights


def _change_norm(weights: dict) -> dict:
    weights["model.layers.2.post_attention_layernorm.weight"] *= 1.1
    return weights


def _skip_layer(weights: dict) -> dict:
    """The engine keeps what it had: random weights, loaded first."""
    return {
        name: torch.randn_like(t) * 0.1 if "layers.3." in name and t.dim() > 1 else t for name, t in weights.items()
    }


def _scale_values(weights: dict) -> dict:
    weights["model.layers.0.self_attn.v_proj.weight"] *= 1.05
    return weights


BROKEN = {
    "swapped": swap_experts,
    "swapped_down": _swap_down,
    "halves": _swap_halves,
    "transposed": _transpose,
    "norm": _change_norm,
    "layer": _skip_layer,
    "values": _scale_values,
}


def _write_columns(engine: Any) -> None:
    """Columns of a wider matrix, as a tensor-parallel engine reads them in place. Raises RunFailed when they arrive changed."""
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    layer = engine._direct.places[name]
    rows, width = layer.shape(layer.parts[name])
    columns = torch.randn(rows, 2 * width)[:, width:]
    layer.write_experts(layer.parts[name], 1, columns)
    if not torch.equal(layer.read(layer.parts[name]), columns):
        raise RunFailed(f"{name} is not what was written")


def _parked(weight_sync: Any, policy: Any, parallel: Parallel, spoil: Any, check: Any) -> dict[str, Any]:
    """The sync while the learner's weights have left the device, which here is the host too, and the engine's cache sleeps."""
    from megarl.learner import host_parked
    from megarl.rollout.checksums import differing_tensors
    from megarl.rollout.weight_sync import WeightSync

    engine, mesh, weights = weight_sync.engine, weight_sync.mesh, policy.parked["weights"]
    spoil()
    for chunk in policy.modules:  # what other ranks map cannot give its memory back
        for parameter in chunk.parameters():
            parameter.data = parameter.data.clone()
    is_on_host, host_parked._is_on_host = host_parked._is_on_host, lambda storage: False
    other = WeightSync(policy.spec, parallel, mesh, engine, weights)
    engine.sleep(2)
    weights.park()
    left = sum(storage.nbytes() for storage in policy._storages()["weights"])
    engine.wake(["weights"])
    with _LiveBytes() as live:
        other.run(policy.modules, 1)
    engine.wake(["kv_cache"])
    names = differing_tensors(other, policy.modules)
    streamed = {name: float(tensor.double().sum()) for name, tensor in other.stream(policy.modules)}
    still = weights.is_parked
    weights.unpark()
    host_parked._is_on_host = is_on_host
    same = streamed == {name: float(tensor.double().sum()) for name, tensor in weight_sync.stream(policy.modules)}
    needed, window = sum(other.buffer_bytes), sum(other.window_bytes)
    return {"gap": check(), "left": left, "differing": names, "same": same, "still": still, "needed": needed,
            "peak": live.peak + window}  # fmt: skip


class _LiveBytes(TorchDispatchMode):
    """Most bytes that tensors made inside the block took up at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.refs = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        before = {self._storage(x)._cdata for x in leaves if isinstance(x, torch.Tensor)}
        before |= {x._cdata for x in leaves if isinstance(x, torch.UntypedStorage)}  # of `set_`
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self._storage(tensor)._cdata not in before:
                self.refs[self._storage(tensor)._cdata] = StorageWeakRef(self._storage(tensor)), tensor.nbytes
        self.refs = {key: item for key, item in self.refs.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.refs.values()))
        return out

    @staticmethod
    def _storage(tensor):
        return tensor.untyped_storage()


def family(path: str, rollout: dict[str, Any], **degrees) -> dict:
    """Two syncs of a checkpoint of any family, the weights changed between them, and all comparisons after each."""
    platform.setup()
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.rollout.checksums import differing_tensors
    from megarl.rollout.weight_sync import WeightSync, compare_with_learner, make_probes, measure_gap

    parallel = Parallel(**degrees)
    engine, mesh = start(path, load=False, parallel=parallel, **rollout)
    policy = Policy.from_hf(path, Config(model=Model(path=path), parallel=parallel), mesh)
    sync, probes = WeightSync(policy.spec, parallel, mesh, engine), make_probes(policy.spec.vocab_size, 4)
    out: dict[str, Any] = {"reload": engine.reload_reason, "gaps": [], "differing": [], "sums": []}
    for version in (1, 2):
        report = sync.run(policy.modules, version)
        out["gaps"].append(measure_gap(engine, probes, probe_log_probs(policy, probes), mesh).mean)
        found = compare_with_learner(engine, mesh, sync.stream(policy.modules))
        out["differing"] += [str(item) for item in found if item.differs]
        out["sums"] += [] if sync.plan.whole else differing_tensors(sync, policy.modules)
        for chunk in policy.modules:
            for parameter in chunk.parameters():
                parameter.data.mul_(1.02)
    return out | {"moved": [report.traffic.received, report.traffic.bound]}
