"""Which layouts can be: every rule about degrees and sizes, and the nearest layouts that keep all of them.

Checked before a process exists, so each rule of Megatron-core and vLLM that a layout can break is written here again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.config import families
from megarl.config.schema import Config, Parallel
from megarl.errors import BadInput

DEGREES = ("tp", "pp", "vpp", "ep", "etp", "cp")
STAGES = ("first_stage_layers", "last_stage_layers", "embedding_in_split", "loss_in_split")
OVERLAP = ("overlap_grad_reduce", "overlap_param_gather", "distributed_optimizer")
SIZES = (*DEGREES[:2], *DEGREES[3:], "tensor_parallel", "data_parallel")  # each divides the world size
LEARNER = tuple(f"parallel.{name}" for name in (*DEGREES, *STAGES))
OVERLAPPING = tuple(f"parallel.{name}" for name in OVERLAP)
ENGINE = ("rollout.tensor_parallel", "rollout.data_parallel", "rollout.expert_parallel")
EVERYTHING = LEARNER + OVERLAPPING + ENGINE
ON_REQUEST = (
    "vpp",
    "etp",
    "cp",
    "first_stage_layers",
    "last_stage_layers",
)  # never suggested to who did not ask for it
MOST_RANKS = 2**16  # of a degree that is suggested: more than any cluster has
MOST, WIDTH = 3, 40  # suggestions, and layouts that the search goes on from after each change


@dataclass(frozen=True)
class Shape:
    """A model whose layers the layout splits: the keys of its config.json, and whose it is."""

    config: Mapping[str, Any]
    whose: str = "the model's"

    @property
    def is_moe(self) -> bool:
        return families.is_moe(self.config)

    @property
    def has_dense_mlp(self) -> bool:
        return families.has_dense_mlp(self.config)


@dataclass(frozen=True)
class Misfit:
    """What is wrong with a layout, and the settings that are to be varied to find others."""

    problem: str
    settings: tuple[str, ...] = LEARNER


def engine_ranks(config: Config) -> int:
    """Ranks of one vLLM engine."""
    return config.rollout.tensor_parallel * config.rollout.data_parallel


def smallest_world(config: Config) -> int:
    """Fewest ranks on which dense layers (tp x pp x cp), experts (etp x ep x pp) and the engine all fit evenly."""
    p = config.parallel
    return math.lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp, engine_ranks(config))


def check_layout(config: Config, shapes: Sequence[Shape], world_size: int | None) -> None:
    """Raise `BadInput` for the first rule that is broken, with the nearest layouts that break none.

    `shapes`: the models that the learner holds, the one that is sampled from first. `world_size`: none when the layout
    decides it.
    """
    misfit = next(misfits(config, shapes, world_size), None)
    if misfit is not None:
        found = nearest(config, shapes, world_size, misfit.settings) or nearest(config, shapes, world_size, EVERYTHING)
        advice = f"nearest that work: {', '.join(found)}" if found else "set other degrees: none near these works"
        raise BadInput(f"{misfit.problem}; {advice}")


def misfits(config: Config, shapes: Sequence[Shape], world_size: int | None) -> Iterator[Misfit]:
    """Every rule that the layout breaks."""
    yield from _combinations(config.parallel)
    yield from _optimizers(config)
    for shape in shapes:
        yield from _learner(config.parallel, shape)
    yield from _engine(config, shapes)
    if shapes:
        yield from _experts(config.parallel, shapes[0])
        yield from _sequences(config, shapes[0].config["max_position_embeddings"])
    yield from _world(config, world_size)


def nearest(config: Config, shapes: Sequence[Shape], world_size: int | None, settings: Sequence[str]) -> list[str]:
    """Up to three layouts that break no rule, with as few of `settings` changed as possible and those by little.

    The size of the world stays what it was where that is possible. Each as `tp=2 pp=2 ep=4`.
    """
    choices = {setting: _choices(config, shapes, world_size, setting) for setting in settings}
    changes: list[dict[str, Any]] = [{}]
    for _ in choices:
        grown = {}
        for change, (setting, values) in itertools.product(changes, choices.items()):
            for value in () if setting in change else values:
                more = change | {setting: value}
                if frozenset(more.items()) not in grown:
                    other = _with(config, more)
                    broken = sum(1 for _ in misfits(other, shapes, world_size))
                    distance = _distance(config, other, more, world_size)
                    grown[frozenset(more.items())] = (broken, distance, _describe(other, more), more)
        ranked = sorted(grown.values(), key=lambda found: found[:3])
        if ranked and ranked[0][0] == 0:
            return [text for broken, _, text, _ in ranked[:MOST] if not broken]
        changes = [more for *_, more in ranked[:WIDTH]]
    return []


def _combinations(p: Parallel) -> Iterator[Misfit]:
    """Settings that exclude or need each other, whatever the model."""
    stages = (*DEGREES[1:3], *STAGES)
    stage_settings = tuple(f"parallel.{name}" for name in stages)
    if p.vpp is not None and p.vpp > 1 and p.pp == 1:
        yield Misfit(f"parallel.vpp = {p.vpp}: virtual stages need a pipeline, and pp = 1", stage_settings)
    for name in STAGES:
        value = getattr(p, name)
        if value in (None, False):
            continue
        said = f"parallel.{name} = {_text(value)}"
        if p.pp == 1:
            yield Misfit(f"{said}: there is one stage, pp = 1", stage_settings)
        if name in ON_REQUEST and p.vpp is not None and p.vpp > 1:
            yield Misfit(f"{said}: not with virtual stages, vpp = {p.vpp}", stage_settings)
        if name in ON_REQUEST and (p.embedding_in_split or p.loss_in_split):
            yield Misfit(f"{said}: not with embedding_in_split or loss_in_split", stage_settings)
    if p.overlap_param_gather and not (p.distributed_optimizer and p.overlap_grad_reduce):
        yield Misfit(
            f"parallel.overlap_param_gather = true: needs distributed_optimizer = true and overlap_grad_reduce = true, "
            f"which are {_text(p.distributed_optimizer)} and {_text(p.overlap_grad_reduce)}",
            OVERLAPPING,
        )


def _optimizers(config: Config) -> Iterator[Misfit]:
    """Megatron shards Adam's state only; a float64 model has no distributed optimizer anyhow."""
    if not config.parallel.distributed_optimizer or config.model.dtype == "float64":
        return
    rl = config.rl
    found = {name: getattr(config, name).optimizer for name in ("sft", "reward_model") if getattr(config, name)}
    found |= {} if rl is None else {"rl": rl.optimizer, "rl.critic": rl.critic.optimizer}
    for name, optimizer in found.items():
        if optimizer.type != "adam":
            yield Misfit(
                f"{name}.optimizer.type = {optimizer.type}: the distributed optimizer shards Adam's state only",
                OVERLAPPING,
            )


def _learner(p: Parallel, shape: Shape) -> Iterator[Misfit]:
    """The degrees divide what they split; a dense MLP is whole on every expert-parallel rank."""
    found = shape.config
    yield from _divides("parallel.tp", p.tp, "attention heads", found["num_attention_heads"], shape)
    if p.tp % found["num_key_value_heads"]:  # otherwise each of them is on several ranks
        yield from _divides("parallel.tp", p.tp, "key/value heads", found["num_key_value_heads"], shape)
    yield from _stages(p, found["num_hidden_layers"], shape.whose)
    if shape.is_moe:
        yield from _divides("parallel.ep", p.ep, "experts", found["num_experts"], shape)
        yield from _divides("parallel.etp", p.etp, "expert intermediate columns", found["moe_intermediate_size"], shape)
        if p.etp > 1 and found["model_type"] in families.EXPERT_BIASES:
            yield Misfit(f"parallel.etp = {p.etp}: {shape.whose} experts have biases, which cannot be shared out")
    if shape.has_dense_mlp and found.get("intermediate_size"):
        yield from _divides("parallel.tp", p.tp, "intermediate columns", found["intermediate_size"], shape)


def _experts(p: Parallel, policy: Shape) -> Iterator[Misfit]:
    """The policy has the experts that are to be split; a dense reward model beside it is whole on every rank."""
    for name in ("ep", "etp"):
        if not policy.is_moe and getattr(p, name) > 1:
            yield Misfit(f"parallel.{name} = {getattr(p, name)}: a dense model has no experts")


def _divides(
    key: str, degree: int, what: str, count: int, shape: Shape, settings: tuple[str, ...] = LEARNER
) -> Iterator[Misfit]:
    if count % degree:
        yield Misfit(f"{key} = {degree}: does not divide {shape.whose} {count} {what}", settings)


def _stages(p: Parallel, layers: int, whose: str) -> Iterator[Misfit]:
    """The layers can be shared out over the stages; a stage without one would train, but Megatron cannot save it."""
    vpp = p.vpp or 1
    if p.first_stage_layers is None and p.last_stage_layers is None:
        extra = [name for name in STAGES[2:] if getattr(p, name)]
        total, stages = layers + len(extra), p.pp * vpp
        counted = f"{whose} {layers} layers" + (f" + {len(extra)} ({' and '.join(extra)})" if extra else "")
        if total % stages:
            yield Misfit(f"parallel.pp = {p.pp}, vpp = {vpp}: {stages} stages do not divide {counted}")
        elif extra and total == stages:
            yield Misfit(f"parallel.pp = {p.pp}, vpp = {vpp}: {stages} stages of {counted} leave one without a layer")
        return
    ends = [value for value in (p.first_stage_layers, p.last_stage_layers) if value is not None]
    rest, middle = layers - sum(ends), p.pp - len(ends)
    said = ", ".join(f"{name} = {getattr(p, name)}" for name in STAGES[:2] if getattr(p, name) is not None)
    if (middle == 0 and rest) or (middle > 0 and (rest < middle or rest % middle)):
        yield Misfit(f"parallel.{said}: leaves {rest} of {whose} {layers} layers to {middle} other stages, pp = {p.pp}")


def _engine(config: Config, shapes: Sequence[Shape]) -> Iterator[Misfit]:
    """vLLM's rules for the model that is sampled from."""
    rollout, ranks = config.rollout, engine_ranks(config)
    if rollout.data_parallel > 1 and not rollout.expert_parallel:
        yield Misfit(
            f"rollout.data_parallel = {rollout.data_parallel}: replicas step together only to share experts, and "
            "expert_parallel = false",
            ENGINE,
        )
    if rollout.expert_parallel and ranks == 1:
        yield Misfit("rollout.expert_parallel = true: an engine of one rank holds every expert", ENGINE)
    if not shapes:
        return
    shape, tensor = shapes[0], rollout.tensor_parallel
    heads, kv_heads = (shape.config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    yield from _divides("rollout.tensor_parallel", tensor, "attention heads", heads, shape, ENGINE)
    if tensor % kv_heads:
        yield from _divides("rollout.tensor_parallel", tensor, "key/value heads", kv_heads, shape, ENGINE)
    if shape.has_dense_mlp and shape.config.get("intermediate_size"):
        columns = shape.config["intermediate_size"]
        yield from _divides("rollout.tensor_parallel", tensor, "intermediate columns", columns, shape, ENGINE)
    if not shape.is_moe:
        if rollout.expert_parallel:
            yield Misfit("rollout.expert_parallel = true: a dense model has no experts", ENGINE)
    elif not rollout.expert_parallel:
        columns = shape.config["moe_intermediate_size"]
        yield from _divides("rollout.tensor_parallel", tensor, "expert columns", columns, shape, ENGINE)
    elif shape.config["num_experts"] < ranks:
        yield Misfit(
            f"rollout.expert_parallel = true: an engine of {ranks} ranks (tensor_parallel x data_parallel) has only "
            f"{shape.whose} {shape.config['num_experts']} experts to deal out",
            ENGINE,
        )


def _sequences(config: Config, model_context: int) -> Iterator[Misfit]:
    """A sequence has a token for every chunk that context parallelism cuts it into, and fits a micro-batch when padded."""
    p, rollout = config.parallel, config.rollout
    chunks = 2 * p.cp if p.cp > 1 else 1
    multiple = chunks * p.tp
    longest: list[tuple[str, int, int | None, int]] = []  # section, its longest sequence, what a row must hold, budget
    for name, sides in (("sft", 1), ("reward_model", 2)):
        section = getattr(config, name)
        if section is not None:
            row = section.max_tokens and sides * -(-section.max_tokens // chunks) * chunks
            longest.append((name, section.max_tokens or model_context, row, section.micro_batch_tokens))
    if config.rl is not None:
        context, prompt = rollout.max_context or model_context, config.rl.max_prompt_tokens
        length = min(context, prompt + rollout.max_response_tokens) if prompt else context
        row = (prompt or 1) + rollout.max_response_tokens
        longest.append(("rl", length, row, config.rl.micro_batch_tokens))
    for name, length, row, budget in longest:
        if length < chunks:
            yield Misfit(
                f"parallel.cp = {p.cp}: the sequences of {name} have at most {length} tokens and are cut into 2 x cp = "
                f"{chunks} chunks"
            )
        padded = -(-(row or 1) // multiple) * multiple
        if padded > budget and (p.tp > 1 or p.cp > 1):
            yield Misfit(
                f"{name}.micro_batch_tokens = {budget}: cp = {p.cp} and tp = {p.tp} pad {row or 1} tokens to a multiple "
                f"of {multiple}, set at least {padded}"
            )


def _world(config: Config, world_size: int | None) -> Iterator[Misfit]:
    """All groups, and the batches, divide over the ranks."""
    p, smallest = config.parallel, smallest_world(config)
    world = world_size or smallest
    if world % smallest:
        engine = f"rollout.tensor_parallel={config.rollout.tensor_parallel}"
        if config.rollout.data_parallel > 1:
            engine += f" x data_parallel={config.rollout.data_parallel}"
        yield Misfit(
            f"world size {world}: not a multiple of {smallest}, which tp={p.tp} pp={p.pp} cp={p.cp} ep={p.ep} "
            f"etp={p.etp} and {engine} need; set parallel.nproc (or --nproc) to {max(1, world // smallest) * smallest}",
            LEARNER + ENGINE,
        )
        return
    dp = world // (p.tp * p.pp * p.cp)
    for name in ("sft", "reward_model"):
        section = getattr(config, name)
        if section is not None and section.batch_size < dp:
            yield Misfit(
                f"{name}.batch_size = {section.batch_size}: below the {dp} data-parallel ranks, set at least {dp}"
            )
    if config.rl is not None:
        rl = config.rl
        per_step = rl.prompts_per_step * rl.samples_per_prompt // rl.optimizer_steps_per_rollout
        if per_step < dp:
            needed = -(-dp * rl.optimizer_steps_per_rollout // rl.samples_per_prompt)
            yield Misfit(
                f"rl.prompts_per_step = {rl.prompts_per_step}: {per_step} sequences per optimizer step for {dp} "
                f"data-parallel ranks, set at least {needed}"
            )


def _choices(config: Config, shapes: Sequence[Shape], world_size: int | None, setting: str) -> list[Any]:
    """Other values to try: both of a switch; of a degree those up to twice as large that can divide something."""
    value, name = _get(config, setting), setting.rpartition(".")[2]
    if isinstance(value, bool):
        return [not value]
    if name in ON_REQUEST and value in (None, 1):
        return []
    counts = {
        "tp": "num_attention_heads",
        "tensor_parallel": "num_attention_heads",
        "ep": "num_experts",
        "etp": "moe_intermediate_size",
    }
    largest = min(2 * value, MOST_RANKS)
    numbers = [number for number in range(2 if name == "vpp" else 1, largest + 1) if number != value]
    if name in counts:
        key = counts[name]
        numbers = [n for n in numbers if all(shape.config.get(key, n) % n == 0 for shape in shapes)]
    if name in SIZES and world_size is not None:
        numbers = [n for n in numbers if world_size % n == 0]
    numbers.sort(key=lambda number: abs(math.log2(number / value)))
    numbers = [
        n for place, n in enumerate(numbers) if place < 8 or n.bit_count() == 1
    ]  # the closest, and powers of two
    return [*numbers, None] if name in ("vpp", *STAGES[:2]) else numbers


def _get(config: Config, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, change: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in change.items():
        section, _, name = setting.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _distance(old: Config, new: Config, change: Mapping[str, Any], world_size: int | None) -> tuple[bool, float]:
    """Another world size first, then how far the changed degrees are, in doublings."""
    p = old.parallel
    wanted = world_size or max(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp, engine_ranks(old))
    ratio = math.log2((world_size or smallest_world(new)) / wanted)
    steps = 0.0
    for setting, value in change.items():
        before = _get(old, setting)
        switched = isinstance(value, bool) or value is None
        steps += 1.5 if switched else 1e-3 * (value > before) + abs(math.log2(value / before))
    return ratio != 0, steps + abs(ratio) / 2


def _describe(config: Config, change: Mapping[str, Any]) -> str:
    """Every degree of the changed sections that is above 1, and whatever was changed."""
    shown = []
    for setting in EVERYTHING:
        section, _, name = setting.partition(".")
        value = _get(config, setting)
        related = any(other.startswith(section) for other in change) and name in (*DEGREES, "tensor_parallel")
        if setting in change or (related and value not in (None, 1)):
            shown.append(f"{name if section == 'parallel' else setting}={_text(value)}")
    return " ".join(shown)


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower()
