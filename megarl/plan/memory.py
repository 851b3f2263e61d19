"""Who has how many bytes of a device in which phase of an RL step, and whether that fits."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

from megarl import algorithms
from megarl.config.schema import Config, Optimizer, Parallel
from megarl.convert import read_spec
from megarl.learner.policy import Role
from megarl.models.generate import spec_of
from megarl.models.spec import ModelSpec
from megarl.plan.activations import Activations, Row, most_kept
from megarl.plan.engine import Cache, buffer_bytes, cache_of, portion_bytes, weight_bytes, workspace_bytes
from megarl.plan.hardware import GIB, Hardware
from megarl.plan.held import Held, held, stage_ranks
from megarl.plan.seconds import PHASES
from megarl.plan.shape import ACTIVATION_BYTES, ModelShape, Rows, Workload
from megarl.plan.volume import checkpoint_bytes, layout_of, sync_plan
from megarl.rollout.sync_plan import SyncPlan

Bytes = tuple[float, float]  # on the device, on the host
# as in the memory ledger of a run, and what it does not see
OWNERS = (
    "policy_weights", "policy_gradients", "policy_optimizer", "critic", "reference", "reward_model", "activations", "fp8_copies",
    "engine_weights", "engine_kv_cache", "engine_workspace", "sync_buffers", "checkpoint_copy",
)  # fmt: skip
LEDGER = {"rollout": "rollout", "sync": "sync", "old_log_probs": "log_probs", "update": "update"}  # a run's names
# bytes beside its codes, a byte each by rows and by columns, that an element in FP8 takes for scales
SCALES = {"blockwise": 2 * 4 / 128**2, "mxfp8": 2 / 32}
RESERVE = {"gpu": 4 * GIB, "cpu": 1 * GIB}


@dataclass(frozen=True)
class RankPlan:
    """One rank: phase -> owner -> bytes on (device, host). A rank stands for all of its pipeline stage."""

    rank: int
    stage: int
    layers: int
    phases: dict[str, dict[str, Bytes]]
    kept: dict[str, float]  # activations of an update by `parallel.recompute`

    def total(self, phase: str, place: int = 0) -> float:
        return sum(amounts[place] for amounts in self.phases[phase].values())


@dataclass(frozen=True)
class MemoryPlan:
    """All stages of a layout on a kind of hardware."""

    cfg: Config
    spec: ModelSpec
    world: int
    hardware: Hardware
    reserve: float  # bytes that nobody is given: context, communicators, fragments
    ranks: tuple[RankPlan, ...]
    cache: Cache
    provider: str
    notes: tuple[str, ...] = field(default=())

    @property
    def is_cpu(self) -> bool:
        return self.hardware.name.startswith("cpu")

    @property
    def place(self) -> int:
        """Of `Bytes`, what the capacity is of: a CPU's ranks have the host's memory."""
        return 1 if self.is_cpu else 0

    @property
    def capacity(self) -> float:
        """Bytes that a rank may use."""
        return self.hardware.memory_bytes - self.reserve

    def worst(self, phase: str) -> RankPlan:
        return max(self.ranks, key=lambda rank: rank.total(phase, self.place))

    def need(self, phase: str) -> float:
        """Bytes of the fullest rank."""
        return self.worst(phase).total(phase, self.place)

    @property
    def tightest(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.need)

    @property
    def problem(self) -> str | None:
        """Why it does not fit, in words; none when it does."""
        phase = self.tightest
        if self.cache.tokens < self.cache.sequence:
            has, r = f"{self.cache.bytes / GIB:.1f} GiB of key/value cache", self.cfg.rollout
            setting = f"rollout.kv_cache_gib = {r.kv_cache_gib}"
            if not self.is_cpu:
                setting = f"rollout.gpu_memory_utilization = {r.gpu_memory_utilization}"
            return f"{setting}: {has} do not hold one sequence of {self.cache.sequence:,} tokens"
        if self.need(phase) <= self.capacity:
            return None
        rank = self.worst(phase)
        largest = sorted(rank.phases[phase].items(), key=lambda item: -item[1][self.place])[:2]
        whose = ", ".join(f"{name} {amounts[self.place] / GIB:.1f}" for name, amounts in largest)
        return (
            f"{phase} needs {self.need(phase) / GIB:.1f} GiB on rank {rank.rank} (stage {rank.stage}; {whose}) and "
            f"{self.hardware.name} has {self.capacity / GIB:.1f} beside the reserve"
        )


def spec_of_config(cfg: Config) -> ModelSpec:
    """Of the config's model, which may not be there yet."""
    path = Path(cfg.model.path)
    return read_spec(path) if (path / "config.json").exists() else spec_of(cfg.model.generate)


def models_of(cfg: Config, spec: ModelSpec) -> dict[Role, tuple[ModelSpec, Optimizer | None]]:
    """Every model that a run of `cfg.rl` has on a rank."""
    algorithm = algorithms.from_config(cfg.rl.algorithm, cfg.rollout.max_response_tokens)
    out: dict[Role, tuple[ModelSpec, Optimizer | None]] = {"policy": (spec, cfg.rl.optimizer)}
    if algorithm.value is not None:
        start = cfg.rl.critic.init_from
        out["critic"] = (read_spec(start) if start else spec, cfg.rl.critic.optimizer)
    if algorithm.needs_reference:
        out["reference"] = (spec, None)
    judges = [reward for reward in (cfg.reward, *cfg.reward.named.values()) if reward.type == "model"]
    if judges:
        out["reward"] = (read_spec(judges[0].params["path"]), None)
    return out


def plan_memory(
    cfg: Config, world: int, hardware: Hardware, work: Workload | None = None, reserve: float | None = None,
    stages: list[int] | None = None,
) -> MemoryPlan:  # fmt: skip
    """Bytes of every owner in every phase of an RL step of `cfg` on `world` ranks.

    `work`: lengths of what is sampled. `stages`: of which pipeline stages; none: of all. Raises BadInput for what a run
    would refuse.
    """
    spec, is_cpu = spec_of_config(cfg), hardware.name.startswith("cpu")
    work = work or Workload.of(cfg)
    models = models_of(cfg, spec)
    provider = provider_of(cfg, is_cpu)
    row = fullest_row(cfg, spec, work)
    dp = world // (cfg.parallel.tp * cfg.parallel.cp * cfg.parallel.pp)
    shape = ModelShape.of(spec)
    rows = Rows.of(work, shape, dp, cfg.parallel.pp if cfg.parallel.vpp else 1)
    plan = sync_plan(cfg, spec, world)
    plan = plan if plan.whole else replace(plan, portion=portion_bytes(is_cpu))  # as `WeightSync` takes them
    weights = weight_bytes(plan, 0, is_cpu)
    cache = cache_of(cfg, spec, weights, None if is_cpu else hardware.memory_bytes)
    engine = {
        "engine_weights": weights,
        "engine_kv_cache": cache.bytes,
        "engine_workspace": 0 if is_cpu else workspace_bytes(cfg, spec),
    }
    copied = checkpoint_bytes(layout_of(cfg, shape, world, rows)) / world if cfg.checkpoint.async_save else 0.0
    ranks = []
    for rank in stage_ranks(cfg, world):
        stage = rank * cfg.parallel.pp // world
        if stages is not None and stage not in stages:
            continue
        found = held(cfg, world, rank, models)
        if cfg.model.fp8_params:  # two codes in place of bfloat16
            scales = SCALES.get(cfg.model.fp8, 0.0) / ACTIVATION_BYTES[cfg.model.dtype]
            found = {role: replace(one, weights=one.weights * (1 + scales)) for role, one in found.items()}
        acting = _activations(cfg, spec, row, provider, hardware)
        ranks.append(_rank(cfg, rank, stage, found, engine, plan, acting, rows.micro_batches, copied, is_cpu))
    if reserve is None:
        reserve = RESERVE["cpu" if is_cpu else "gpu"]
    return MemoryPlan(cfg, spec, world, hardware, reserve, tuple(ranks), cache, provider)


def provider_of(cfg: Config, is_cpu: bool) -> str:
    """Whose layers a run has there: on GPUs those of Transformer Engine unless PyTorch's are asked for."""
    if is_cpu or cfg.model.layers == "torch" or cfg.model.dtype == "float64":
        return "torch"
    return "te"


def fullest_row(cfg: Config, spec: ModelSpec, work: Workload) -> Row:
    """As many sequences of the step's lengths as the token budget holds, longest first, as packing fills rows."""
    budget, lengths = cfg.rl.micro_batch_tokens, []
    prompt = round(work.prompt)
    sample = [prompt + round(length) for length in reversed(work.lengths(min(work.sequences, 64)))]
    for length in (sample * (budget // max(1, min(sample)) // len(sample) + 1)):
        if sum(lengths) + length <= budget:
            lengths.append(length)
    lengths = lengths or [budget]
    scored = sum(lengths) - len(lengths) * prompt
    return _row_for(tuple(lengths), (cfg.parallel.tp, cfg.parallel.cp), scored, spec.windows)


def _activations(cfg: Config, spec: ModelSpec, row: Row, provider: str, hardware: Hardware) -> Activations:
    item = ACTIVATION_BYTES[cfg.model.dtype]
    head = 4 if cfg.model.head_dtype == "float32" else item
    is_cpu = hardware.name.startswith("cpu")
    balance = hardware.efficiency.balance
    return Activations(spec, cfg.parallel, row, item, provider, is_cpu, head, balance)


def _rank(
    cfg: Config, rank: int, stage: int, found: dict[Role, Held], engine: dict[str, int], plan: SyncPlan,
    acting: Activations, rows: int, copied: float, is_cpu: bool,
) -> RankPlan:  # fmt: skip
    """The phases of one rank. On the device unless parked; on a CPU the host is the device."""
    memory = cfg.memory
    grads_leave = memory.grad_offload if memory.grad_offload is not None else not is_cpu
    policy = found["policy"]
    layers = [number for chunk in policy.layers for number in chunk]
    is_last = stage == cfg.parallel.pp - 1
    kept = {}
    for name in ("none", "selective", "full"):
        other = replace(acting, parallel=cfg.parallel.model_copy(update={"recompute": name}))
        kept[name] = most_kept([other], policy.layers, stage, rows)
    training = kept[cfg.parallel.recompute] + acting.transient(layers, is_last)
    scoring = acting.forward(layers, is_last)
    def here(size: float) -> Bytes:
        return (0.0, size) if is_cpu else (size, 0.0)

    # Transformer Engine keeps every linear's weight in FP8 twice, by rows and by columns, from a step's first micro-batch
    # on, unless they are all there is; of the embedding, which has none, it is counted too
    copies = 2 * policy.weights / acting.item if has_fp8_copies(cfg, acting.provider) else 0.0
    forward = {"activations": here(scoring), "fp8_copies": here(copies)}
    backward = {"activations": here(training), "fp8_copies": here(copies)}

    def parked(size: float, leaves: bool, forgotten: bool = False) -> Bytes:
        """`leaves`: to the host, or away with what is forgotten."""
        if not leaves:
            return here(size)
        return (0.0, 0.0) if forgotten else (0.0, size)

    def trained(one: Held, optimizer: Optimizer, learning: bool, updating: bool) -> dict[str, Bytes]:
        away = optimizer.cpu_offload
        return {
            "weights": parked(one.weights, memory.param_offload and not learning),
            "gradients": parked(one.gradients, grads_leave and not updating, forgotten=True),
            "optimizer": parked(one.optimizer, away or (memory.optimizer_offload and not updating)),
        }

    def learner(learning: bool, updating: bool, referring: bool = False) -> dict[str, Bytes]:
        out = {f"policy_{k}": v for k, v in trained(policy, cfg.rl.optimizer, learning, updating).items()}
        if "critic" in found:
            parts = trained(found["critic"], cfg.rl.critic.optimizer, learning, updating).values()
            out["critic"] = tuple(map(sum, zip(*parts, strict=True)))
        for role, owner in (("reference", "reference"), ("reward", "reward_model")):
            if role in found:  # a copy stays on the host
                size = found[role].weights
                is_here = (referring if role == "reference" else False) and not is_cpu
                out[owner] = (size if is_here else 0.0, size)
        return out

    def sampler(level: int) -> dict[str, Bytes]:
        """vLLM asleep at a level; a CPU's never sleeps."""
        if level == 0 or is_cpu:
            return {name: here(size) for name, size in engine.items()}
        return {"engine_weights": (0.0, engine["engine_weights"] if level == 1 else 0.0)}

    plain = policy.weights if cfg.model.fp8_params else 0.0  # a checkpoint holds the numbers that codes stand for
    level = memory.sleep_level
    waking = sampler(0) if level == 0 or is_cpu else {"engine_weights": here(engine["engine_weights"])}
    phases = {
        "rollout": learner(False, False) | sampler(0),
        "sync": learner(False, False) | waking | {"sync_buffers": here(buffer_bytes(plan, rank, is_cpu))},
        "old_log_probs": learner(True, False, referring=True) | sampler(level) | forward,
        "update": learner(True, True) | sampler(level) | backward,
        "checkpoint": learner(True, True) | sampler(min(level, 1)) | {"checkpoint_copy": (plain, copied)},
    }
    ordered = {
        phase: {owner: owners[owner] for owner in OWNERS if any(owners.get(owner, (0, 0)))} for phase, owners in phases.items()
    }
    return RankPlan(rank, stage, len(layers), ordered, kept)


def has_fp8_copies(cfg: Config, provider: str) -> bool:
    """Whether weights are kept in FP8 beside what the optimizer updates."""
    return cfg.model.fp8 != "none" and provider == "te" and not cfg.model.fp8_params


def estimate(
    cfg: Config, world: int, hardware: Hardware, work: Workload | None = None, reserve: float | None = None, phase: str = ""
) -> float:
    """Without building anything: the fullest stage's share of the capacity in an update, or with `phase` "free" the bytes
    that the learner leaves to vLLM.

    From the model's table of weights; norms and routers count as cut over tp, which they are not.
    """
    spec, is_cpu = spec_of_config(cfg), hardware.name.startswith("cpu")
    work, shape, p = work or Workload.of(cfg), ModelShape.of(spec), cfg.parallel
    rows = Rows.of(work, shape, world // (p.tp * p.cp * p.pp), p.pp if p.vpp else 1)
    layout = layout_of(cfg, shape, world, rows)
    capacity = hardware.memory_bytes - (reserve if reserve is not None else RESERVE["cpu" if is_cpu else "gpu"])
    acting = _activations(cfg, spec, fullest_row(cfg, spec, work), provider_of(cfg, is_cpu), hardware)
    trained = 2 if "critic" in models_of(cfg, spec) else 1
    most = resting = 0.0
    for stage in range(p.pp):
        dense, experts = layout.parameters(stage)
        shards = (layout.dp * p.cp, layout.edp) if p.distributed_optimizer else (1, 1)
        states = (8 + (4 if layout.item < 4 else 0)) * (dense / shards[0] + experts / shards[1])
        weights, gradients = (dense + experts) * layout.item, 4 * (dense + experts)
        layers = layout.stage_layers(stage)
        kept = most_kept([acting], [layers], stage, rows.micro_batches) + acting.transient(layers, stage == p.pp - 1)
        away = cfg.rl.optimizer.cpu_offload
        copies = 2 * (dense + experts) if has_fp8_copies(cfg, provider_of(cfg, is_cpu)) else 0
        most = max(most, trained * (weights + gradients + (0 if away else states)) + kept + copies)
        left = 0 if cfg.memory.param_offload else weights
        left += 0 if cfg.memory.grad_offload in (None, True) else gradients
        left += 0 if cfg.memory.optimizer_offload or away else states
        resting = max(resting, trained * left)
    return capacity - 1.02 * resting if phase == "free" else most / capacity


@functools.lru_cache(maxsize=64)
def _row_for(lengths: tuple[int, ...], parallel: tuple[int, int], scored: int, windows: tuple[int, ...]) -> Row:
    return Row.of(lengths, Parallel(tp=parallel[0], cp=parallel[1]), scored, windows)
