"""Run by the ranks of `test_routing.py`: routing recorded by a learner or an engine, replayed by a learner."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl import platform

platform.setup()

from megarl.algorithms import PRESETS  # noqa: E402
from megarl.config.schema import Config, Model, Optimizer, Parallel  # noqa: E402
from megarl.data.packing import micro_batches  # noqa: E402
from megarl.errors import BadInput, RunFailed  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.metrics import reduce_metrics  # noqa: E402
from megarl.models.moe.replay import LIVE, RoutingReplay, RowRouting  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402
from megarl.platform import vllm_patches  # noqa: E402
from megarl.trainers.routing import RoutingWatch, own_rows, replay_recorded, replay_rollout  # noqa: E402
from megarl.types import Batch, MicroBatch, Prompt, PromptGroup  # noqa: E402
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood  # noqa: E402
from tests.dist.vllm_cases import prompts, start  # noqa: E402


def replays(layouts: dict[str, tuple[str, dict[str, Any]]], budget: int) -> dict[str, dict[str, list[str]]]:
    """By layout, then by `parallel.recompute`, or `faults`: what does not hold. All layouts in the same processes.

    `layouts`: of each the checkpoint and the parallel section.
    """
    from megatron.core import parallel_state

    out: dict[str, dict[str, list[str]]] = {}
    for name, (path, degrees) in layouts.items():
        mesh = Mesh.build(Parallel(**degrees))
        out[name], norms = {}, []
        for recompute in ("none", "selective", "full"):
            parallel = Parallel(**degrees, recompute=recompute)
            policy = _policy(path, parallel, mesh)
            if recompute == "none":
                out[name]["faults"] = _faults(policy, budget)
            found, norm = _replay(policy, budget)
            norms.append(norm)
            found["the gradients of layers computed once"] = abs(norm / norms[0] - 1) < 1e-5
            out[name][recompute] = [what for what, holds in found.items() if not holds]
        parallel_state.destroy_model_parallel()
    return out


def _policy(path: str, parallel: Parallel, mesh: Mesh, **settings: Any) -> Policy:
    cfg = Config(model=Model(path=path), parallel=parallel)
    return Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-2), total_steps=10, routing=True, **settings)


def _batch() -> Batch:
    batch = fixed_batch()
    version = torch.zeros(len(batch.tokens), dtype=torch.int32)
    return batch.replace(
        sequence_index=torch.arange(len(batch)), rollout_log_probs=torch.zeros(len(version)), policy_version=version
    )


def _replay(policy: Policy, budget: int) -> tuple[dict[str, bool], float]:
    """What holds, and the gradient norm of a step with experts that no router would choose."""
    batch, mesh = _batch(), policy.mesh
    packed = micro_batches(batch, budget, policy.layout)
    live, routing = policy.read(packed)
    trained = _train(policy, packed)
    record = _record(policy, batch, packed, routing)
    replay_recorded(packed, routing)
    own = [micro.experts.clone() for micro in packed]
    found = {
        "several micro-batches of different lengths": len({len(micro.tokens) for micro in packed}) > 1,
        "live in training": _same(packed, live, trained),
        "R2 without gradients": _equal(policy.read(packed)[0], live),
        "R2 in training": _same(packed, live, _train(policy, packed)),
    }
    from_engine = micro_batches(batch.replace(routed_experts=record), budget, policy.layout)
    shares = reduce_metrics(replay_rollout(policy, from_engine), mesh.all_gather_object)
    wanted = len(batch) / len(batch.tokens)
    found |= {
        "R3 gives the experts of R2": all(
            torch.equal(torch.where(micro.experts == LIVE, experts, micro.experts), experts)
            for micro, experts in zip(from_engine, own, strict=True)
        ),
        "only last tokens are live": abs(shares["routing/live_fraction"] - wanted) < 1e-9,
        "R3 without gradients": _equal(policy.read(from_engine)[0], live),
        "R3 in training": _same(packed, live, _train(policy, from_engine)),
    }
    for micro, experts in zip(packed, own, strict=True):
        micro.experts = (experts + 1) % policy.spec.num_experts
    others = [values[micro.owned] for micro, values in zip(packed, policy.read(packed)[0])]
    found |= {
        "other experts, other log-probs": all((a != b[m.owned]).any() for a, b, m in zip(others, live, packed)),
        "other experts in training too": _equal(_train(policy, packed), others),
    }
    before = [weight.detach().clone() for weight in _routers(policy)]
    result = policy.train_step(packed, negative_log_likelihood)
    assert result.applied
    found["gradients reach the routers"] = all(w.main_grad.abs().max() > 0 for w in _routers(policy))
    found["routers move"] = not any(torch.equal(a, b) for a, b in zip(before, _routers(policy), strict=True))
    return found, result.grad_norm


def _routers(policy: Policy) -> list[torch.nn.Parameter]:
    named = (item for chunk in policy.modules for item in chunk.named_parameters())
    return [parameter for name, parameter in named if name.endswith("mlp.router.weight")]


def _train(policy: Policy, packed: list[MicroBatch]) -> list[Tensor]:
    """Log-probs of the tokens this rank scores, as a training pass has them; a loss of 0 moves no weight."""
    seen: list[Tensor] = []

    def loss(batch: Batch, log_probs: Tensor, entropy: Tensor, shards: Any) -> Any:
        seen.append(log_probs.detach().clone())
        return 0.0 * log_probs.sum(), {}

    assert policy.train_step(packed, loss).applied
    return seen


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def _same(packed: list[MicroBatch], whole: list[Tensor], owned: list[Tensor]) -> bool:
    return _equal([values[micro.owned] for micro, values in zip(packed, whole)], owned)


def _record(policy: Policy, batch: Batch, packed: list[MicroBatch], routing: list[RowRouting]) -> Tensor:
    """[N, L, k]: what the routers of all ranks chose, as an engine's record; distinct experts for last tokens."""
    spec, offsets, mine = policy.spec, batch.offsets(), []
    for micro, row in zip(packed, routing, strict=True):
        places = [torch.arange(offsets[s], offsets[s + 1]) for s in micro.batch.sequence_index.tolist()]
        token = torch.cat([torch.empty(0, dtype=torch.int64), *places])
        rows, real = (own_rows(x, policy.mesh) for x in (micro.held, micro.targets >= 0))
        mine.append((token[rows[real]], [layer.number for layer in policy.routing.layers], row.stacked()[:, real]))
    record = torch.arange(spec.top_k).repeat(len(batch.tokens), len(spec.moe_layers), 1)
    for rank in policy.mesh.all_gather_object(mine):
        for tokens, layers, experts in rank:
            for layer, chosen in zip(layers, experts, strict=True):
                record[tokens, spec.moe_layers.index(layer)] = chosen.long()
    return record


def _shifted(record: Tensor) -> Tensor:
    return record.roll(1, 0)


def _swapped(record: Tensor) -> Tensor:
    return record[:, [0, 2, 1, 3]]


def _outside(record: Tensor) -> Tensor:
    record[3, 2, 1] = 8
    return record


def _twice(record: Tensor) -> Tensor:
    record[3, 1] = 5
    return record


FAULTS = {"shifted": _shifted, "swapped": _swapped, "outside": _outside, "twice": _twice, "short": lambda r: r[:, 1:]}


def _faults(policy: Policy, budget: int) -> list[str]:
    """What `RoutingWatch` says of a good record, then what it, or the replay, says of each bad one."""
    batch = _batch()
    watch = RoutingWatch(policy, PRESETS["gspo"], 2 * budget, 0.3)
    packed = micro_batches(batch, budget, policy.layout)
    record = _record(policy, batch, packed, policy.read(packed)[1])
    said = []
    faults = FAULTS if len(policy.spec.moe_layers) == 4 else {}
    for name, spoil in {"good": lambda x: x, **faults}.items():
        spoiled = batch.replace(routed_experts=spoil(record.clone()))
        try:
            if name in ("outside", "twice", "short"):
                replay_rollout(policy, micro_batches(spoiled, budget, policy.layout))
            else:
                watch.before(spoiled, noise=name == "good")
            problem = ""
        except RunFailed as error:
            problem = str(error)
        said.append(problem)
    not_of_now = batch.replace(routed_experts=_shifted(record), policy_version=batch.policy_version - 1)
    assert math.isnan(watch.before(not_of_now, noise=False)["routing/engine_changed"].value())
    return said


def engine(path: str, folder: str, parallel: dict[str, int], rollout: dict[str, Any]) -> dict[str, Any]:
    """An engine's record of its samples against the learner's routing, and its way through every container.

    Prompts of 33 to 70 tokens are prefilled 32 at a time, and all samples but a prompt's first reuse its cached blocks.
    """
    import vllm

    from megarl.convert import read_spec
    from megarl.rollout import vllm_engine
    from megarl.rollout.engine import Sampling
    from megarl.rollout.weight_sync import WeightSync
    from megarl.trainers import rl_batch
    from megarl.trainers.rollout_files import read_groups, write_groups
    from megarl.verify.routing import RoutingCheck

    cached, plain = [0], vllm_engine._extend

    def extend(response: Any, output: Any) -> None:
        plain(response, output)
        cached[0] += output.prefill_stats.num_cached_tokens if output.prefill_stats else 0

    asked, recorded = [], vllm_patches.recorded_routing
    vllm_patches.recorded_routing = lambda runner: asked.append(recorded(runner)) or asked[-1]
    vllm_engine._extend = extend
    vllm.LLM = partial(_few_tokens_a_step, vllm.LLM)
    degrees, spec = Parallel(**parallel), read_spec(path)
    sampler, mesh = start(path, load=False, parallel=degrees, routed_experts=True, max_concurrent=16, **rollout)
    policy = _policy(path, degrees, mesh, temperature=0.8)
    WeightSync(spec, degrees, mesh, sampler).run(policy.modules, policy.updates)
    some = [Prompt(p.prompt_id, p.token_ids[: 33 + 9 * i], None) for i, p in enumerate(prompts(5, 70))]
    layout = sampler.layout
    own = sampler.generate(some[layout.index :: layout.count], Sampling(3, 12, 0.8), 1)
    own = own if mesh.rank % layout.tensor_parallel == 0 else []
    groups = [group for groups in mesh.all_gather_object(own) for group in groups]
    file = Path(folder) / f"rank{mesh.rank}.jsonl"
    write_groups(file, groups)
    back = read_groups(file)
    batch = rl_batch.assemble(back, PRESETS["gspo"])
    packed = micro_batches(batch, 220, policy.layout)
    cfg = Config(model=Model(path=path), parallel=degrees)
    lines, problems = RoutingCheck(cfg, policy, packed).run()
    bad = {}
    for name in ("shifted", "swapped"):
        spoiled = batch.replace(routed_experts=FAULTS[name](batch.routed_experts))
        bad[name] = RoutingCheck(cfg, policy, micro_batches(spoiled, 220, policy.layout)).run()[1]
    plain_begin = RoutingReplay.begin
    RoutingReplay.begin = lambda self, *args: _off_by_one(plain_begin(self, *args), layer=1)
    bad["replay"] = RoutingCheck(cfg, policy, packed).run()[1][-1:]
    ids = torch.cat([micro.experts.flatten() for micro in packed])
    return {
        "cached": cached[0],
        "tokens a step": sampler.vllm_config.scheduler_config.max_num_batched_tokens,
        "dtypes": [str(_first(groups).dtype), str(_first(back).dtype), str(batch.routed_experts.dtype), str(ids.dtype)],
        "kept": all(
            (a.routed_experts == b.routed_experts).all()
            for x, y in zip(groups, back, strict=True)
            for a, b in zip(x.trajectories, y.trajectories, strict=True)
        ),
        "lengths": [t.num_tokens - len(t.routed_experts) for group in back for t in group.trajectories],
        "largest": int(ids.max()),
        "distinct": len(ids.unique()),
        "lines": lines,
        "problems": problems,
        "bad": bad,
        "asked at the start": asked,
        "refused": _refused(sampler, path),
    }


def _off_by_one(row: RowRouting, layer: int) -> RowRouting:
    """The experts that one layer is given are not those that were asked for."""
    for replay in row.owner.layers:
        if row.experts is not None and replay.number == layer:
            experts = row.experts[replay.index]
            row.experts[replay.index] = torch.where(experts < 0, experts, (experts + 1) % row.owner.spec.num_experts)
    return row


def _refused(sampler: Any, path: str) -> list[str]:
    """What is said at the start of a vLLM that cannot record, does not, or records a layer or an expert too many."""
    said = []
    for name, answer, start_again in (
        ("records_routing", False, lambda: sampler._start(path, "float32", False, None)),
        ("recorded_routing", None, sampler._check_record),
        ("recorded_routing", (5, 3), sampler._check_record),
        ("recorded_routing", (4, 4), sampler._check_record),
    ):
        setattr(vllm_patches, name, lambda *_, answer=answer: answer)
        try:
            start_again()
        except BadInput as error:
            said.append(str(error))
    return said


def _few_tokens_a_step(plain: Any, *args: Any, **kwargs: Any) -> Any:
    return plain(*args, **kwargs | {"max_num_batched_tokens": 32})


def _first(groups: list[PromptGroup]) -> Any:
    return groups[0].trajectories[0].routed_experts
