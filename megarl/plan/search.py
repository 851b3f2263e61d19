"""Layouts that fit, best first, and what would make one fit that does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megarl.config.check import model_shape
from megarl.config.layouts import Shape, misfits
from megarl.config.schema import Config
from megarl.errors import BadInput
from megarl.plan.hardware import GIB, Hardware
from megarl.plan.memory import MemoryPlan, estimate, plan_memory, spec_of_config
from megarl.plan.seconds import old_log_probs, rollout, update
from megarl.plan.shape import ACTIVATION_BYTES, ModelShape, Rows, Workload
from megarl.plan.volume import layout_of

MOST_GPUS = 4096
ROOM = 1.05  # times the capacity, above which an estimate is not looked at more closely
TRIED = 24  # layouts that are counted on real modules, at most
UTILIZATION = 0.9  # of a device by vLLM, at most
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Found:
    """A layout that fits: what to set, its seconds a step without the sync, and its bytes."""

    cfg: Config
    settings: dict[str, Any]  # what differs from the given configuration
    seconds: dict[str, float]
    plan: MemoryPlan

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def overrides(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.settings.items())

    @property
    def why(self) -> str:
        """What its step's time goes to, and how full it is."""
        phase = self.plan.tightest
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {self.plan.need(phase) / GIB:.1f} of {self.plan.capacity / GIB:.1f} GiB in {phase}"


def search(cfg: Config, world: int, hardware: Hardware, work: Workload | None = None, most: int = 5,
           reserve: float | None = None) -> list[Found]:  # fmt: skip
    """Up to `most` layouts of `cfg` on `world` ranks that fit, those with the shortest step first.

    Varied: tp, pp, ep, recompute, vLLM's layout and its share of the device; the rest stays as it is given.
    """
    work = work or Workload.of(cfg)
    spec = spec_of_config(cfg)
    shape, sizes = ModelShape.of(spec), Shape(model_shape(cfg, "model"))
    found = []
    engines = _engines(cfg, world, hardware, work, shape, sizes)
    learners = list(_learners(cfg, world, hardware, work, shape, sizes))
    pairs = sorted(
        ((learner[0] + engine[0], i, j) for i, learner in enumerate(learners) for j, engine in enumerate(engines)),
    )
    tried = 0
    for _, i, j in pairs:
        if len(found) == most or tried == TRIED:
            break
        seconds, candidate, parts = learners[i]
        own = candidate.model_copy(update={"rollout": engines[j][1].rollout})
        own = _with_room(own, world, hardware, work, reserve)
        if own is None or estimate(own, world, hardware, work, reserve) > 1.0 * ROOM:
            continue
        tried += 1
        plan = plan_memory(own, world, hardware, work, reserve, stages=_telling(own))
        if plan.problem is None:
            found.append(Found(own, _changes(cfg, own), {"rollout": engines[j][0], **parts}, plan))
    return found


def _telling(cfg: Config) -> list[int]:
    """Stages that hold all kinds of shares: the first two and the last two."""
    return sorted({0, min(1, cfg.parallel.pp - 1), max(0, cfg.parallel.pp - 2), cfg.parallel.pp - 1})


def _learners(cfg: Config, world: int, hardware: Hardware, work: Workload, shape: ModelShape, sizes: Shape) -> Iterator[Any]:
    """(seconds, configuration, seconds by phase) of every layout of the learner that can be."""
    node = hardware.gpus_per_node
    spec = shape.spec
    powers = [2**i for i in range(13) if 2**i <= world]
    for tp, pp, ep in itertools.product(powers, powers, powers if spec.is_moe else [1]):
        if tp > node or pp > spec.num_layers:
            continue
        change = {"nproc": world, "tp": tp, "pp": pp, "ep": ep, "vpp": None}
        change |= {"first_stage_layers": None, "last_stage_layers": None}
        if pp == 1:
            change |= {"embedding_in_split": False, "loss_in_split": False}
        for own in _splits(cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=change)})):
            if next(misfits(own, [sizes], world), None) is None:
                break
        else:
            continue
        dp = world // (tp * pp * own.parallel.cp)
        rows = Rows.of(work, shape, dp, 1)
        for recompute in RECOMPUTE:
            one = own.model_copy(update={"parallel": own.parallel.model_copy(update={"recompute": recompute})})
            layout = layout_of(one, shape, world, rows)
            parts = {
                "old_log_probs": old_log_probs(layout, hardware).seconds * work.optimizer_steps,
                "update": update(layout, hardware).seconds * work.optimizer_steps,
            }
            yield sum(parts.values()), one, parts


def _splits(cfg: Config) -> Iterator[Config]:
    """As it is, and with embedding and loss counted as layers or not."""
    yield cfg
    for both in (True, False):
        change = {"embedding_in_split": both, "loss_in_split": both}
        yield cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=change)})


def _engines(cfg: Config, world: int, hardware: Hardware, work: Workload, shape: ModelShape, sizes: Shape) -> list[Any]:
    """(seconds of a rollout, configuration) of every layout of vLLM that can be."""
    out, node = [], hardware.gpus_per_node
    powers = [2**i for i in range(7) if 2**i <= world]
    learner = cfg.parallel.model_copy(
        update={"nproc": None, "tp": 1, "pp": 1, "ep": 1, "cp": 1, "etp": 1, "vpp": None, "embedding_in_split": False,
                "loss_in_split": False, "first_stage_layers": None, "last_stage_layers": None}
    )  # fmt: skip
    for tensor, data in itertools.product([n for n in powers if n <= node], powers):
        for experts in (False, True):
            change = {"tensor_parallel": tensor, "data_parallel": data, "expert_parallel": experts}
            own = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=change), "parallel": learner})
            if world % (tensor * data) == 0 and next(misfits(own, [sizes], world), None) is None:
                out.append((rollout(own, shape, hardware, world, work).seconds, own))
    return out


def _with_room(cfg: Config, world: int, hardware: Hardware, work: Workload, reserve: float | None) -> Config | None:
    """vLLM with as much of the device as the learner leaves; none when that holds no sequence."""
    if hardware.name.startswith("cpu"):
        return cfg
    left = estimate(cfg, world, hardware, work, reserve, phase="free")
    share = min(UTILIZATION, int(100 * left / hardware.memory_bytes) / 100)
    if share <= 0.05:
        return None
    return cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"gpu_memory_utilization": share})})


def _changes(old: Config, new: Config) -> dict[str, Any]:
    out = {}
    for section in ("parallel", "rollout", "memory", "rl"):
        before, after = getattr(old, section), getattr(new, section)
        for name in type(after).model_fields:
            value = getattr(after, name)
            if value != getattr(before, name) and not hasattr(value, "model_fields"):
                out[f"{section}.{name}"] = value
    if old.rl.optimizer.cpu_offload != new.rl.optimizer.cpu_offload:
        out["rl.optimizer.cpu_offload"] = new.rl.optimizer.cpu_offload
    return out


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower()


# -- what would make it fit ----------------------------------------------------------------------------------------


def refuse(plan: MemoryPlan, work: Workload | None = None) -> None:
    """Nothing when the plan fits. Raises BadInput, with what would, when it does not."""
    if plan.problem is None:
        return
    cfg, world, hardware = plan.cfg, plan.world, plan.hardware
    advice = []
    change = _single_change(plan, work)
    if change:
        advice.append(f"on these {world} ranks it fits with {change}")
    smallest = smallest_world(cfg, hardware, work, plan.reserve)
    if smallest is None:
        advice.append(f"no layout of up to {MOST_GPUS:,} ranks of this kind was found that does")
    else:
        count, found = smallest
        advice.append(f"the smallest number of {hardware.name} that would do is {count}, with {found.overrides or 'this layout'}")
    raise BadInput(f"does not fit on {world} x {hardware.name}: {plan.problem}; {'; '.join(advice)}")


def _single_change(plan: MemoryPlan, work: Workload | None) -> str | None:
    """The first of a few settings with which the same layout fits."""
    cfg, stages = plan.cfg, sorted({plan.worst(plan.tightest).stage, 0, plan.cfg.parallel.pp - 1})
    for section, change in _candidates(plan):
        own = _changed(cfg, section, change)
        if own == cfg:
            continue
        other = plan_memory(own, plan.world, plan.hardware, work, plan.reserve, stages=stages)
        if other.problem is None and plan_memory(own, plan.world, plan.hardware, work, plan.reserve).problem is None:
            return " ".join(f"{section}.{key}={_text(value)}" for key, value in change.items())
    return None


def _candidates(plan: MemoryPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    cfg, memory = plan.cfg, plan.hardware.memory_bytes
    if not plan.is_cpu:
        rank = max(plan.ranks, key=lambda rank: _learner_bytes(rank))
        share = int(100 * (plan.capacity - _learner_bytes(rank)) / memory) / 100
        if 0.05 < share <= UTILIZATION:
            yield "rollout", {"gpu_memory_utilization": share}
        yield "memory", {"sleep_level": 2}
        yield "memory", {"optimizer_offload": True}
        yield "memory", {"grad_offload": True}
        yield "memory", {"param_offload": True}
    for recompute in ("selective", "full"):
        yield "parallel", {"recompute": recompute}
    yield "parallel", {"distributed_optimizer": True}
    longest = (cfg.rl.max_prompt_tokens or 0) + cfg.rollout.max_response_tokens
    if cfg.rl.micro_batch_tokens > longest and cfg.rl.max_prompt_tokens:
        yield "rl", {"micro_batch_tokens": longest}
    if not plan.is_cpu:
        yield "rl.optimizer", {"cpu_offload": True}


def _learner_bytes(rank: Any) -> float:
    return sum(here for owner, (here, _) in rank.phases["rollout"].items() if not owner.startswith("engine_"))


def _changed(cfg: Config, section: str, change: dict[str, Any]) -> Config:
    if section == "rl.optimizer":
        optimizer = cfg.rl.optimizer.model_copy(update=change)
        return cfg.model_copy(update={"rl": cfg.rl.model_copy(update={"optimizer": optimizer})})
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=change)})


def smallest_world(
    cfg: Config, hardware: Hardware, work: Workload | None, reserve: float | None
) -> tuple[int, Found] | None:
    """The fewest ranks on which some layout fits, of whole nodes in powers of two and half way between."""
    sizes = {2**i for i in range(13)} | {3 * 2**i for i in range(3, 11)}
    shape = ModelShape.of(spec_of_config(cfg))
    # weights and float32 gradients are on some rank each: on fewer ranks no layout can fit
    least = shape.parameters * (ACTIVATION_BYTES[cfg.model.dtype] + 4) / hardware.memory_bytes
    for count in sorted(size for size in sizes if least <= size <= MOST_GPUS):
        found = search(cfg, count, hardware, work, most=1, reserve=reserve)
        if found:
            return count, found[0]
    return None
