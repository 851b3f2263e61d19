"""`megarl verify routing`: the engine's experts against the learner's, whether replay is exact, and what is gained by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl import launcher
from megarl.algorithms import PRESETS
from megarl.config.schema import RL, Config, Optimizer
from megarl.data import BatchLayout, PromptSource, load_tokenizer, micro_batches
from megarl.errors import RunFailed
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Metric, merge, reduce_metrics
from megarl.models.moe.drift import Drift
from megarl.models.moe.replay import RowRouting
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.rollout.engine import Engine, Sampling
from megarl.rollout.fp8_weights import Fp8Weights
from megarl.rollout.vllm_engine import VLLMEngine
from megarl.rollout.weight_sync import WeightSync
from megarl.trainers.common import starting_checkpoint
from megarl.trainers.rl_batch import assemble
from megarl.trainers.routing import changed_layers, own_rows, replay_recorded, replay_rollout
from megarl.types import Batch, MicroBatch, Prompt, PromptGroup

TIE = 1e-5  # router logits: float32 rounding can swap the last chosen and the first other expert below this margin
PROMPTS, SAMPLES, PROMPT_LENGTH = 8, 4, 16
PARTS = 4  # micro-batches of a rank, about
LISTED = 6  # margins shown of a layer
CHEAP = 500_000_000  # parameters of a rank up to which a float32 copy of the learner is made


def verify_routing(cfg: Config) -> None:
    """Sync a learner into an engine, sample, and compare and replay the routing of what was sampled. Collective.

    Raises BadInput when the engine cannot record experts; RunFailed, naming the layer, when the record is not the
    learner's routing, or when replayed experts do not give the same log-probs.
    """
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"routed_experts": True})})
    mesh = Mesh.build(cfg.parallel)
    path = starting_checkpoint(cfg, mesh)
    policy = Policy.from_hf(
        path, cfg, mesh, optimizer=Optimizer(), temperature=cfg.rollout.temperature, routing=True
    )
    how = dict(load=False, fp8=Fp8Weights.of(policy.spec, cfg.model, cfg.rollout), head_dtype=cfg.model.head_dtype)
    engine = VLLMEngine(path, cfg.rollout, cfg.rollout_dtype, cfg.seed, mesh, **how)
    WeightSync(policy.spec, cfg.parallel, mesh, engine).run(policy.modules, policy.updates)
    batch = assemble(sample(cfg, policy.spec, mesh, engine), PRESETS["gspo"])
    check = RoutingCheck(cfg, policy, micro_batches(batch, budget(batch, policy.layout), policy.layout))
    lines, problems = check.run()
    stream = launcher.terminal()
    if mesh.is_main and stream is not None:
        precision = f"learner {cfg.model.dtype}, engine {cfg.rollout_dtype}"
        title = f"{len(batch)} sampled sequences, {len(batch.tokens)} tokens; {precision}"
        print("\n".join([title, *lines]), file=stream, flush=True)
    if problems:
        raise RunFailed(f"verify routing: {'; '.join(problems)}")


def sample(cfg: Config, spec: ModelSpec, mesh: Mesh, engine: Engine) -> list[PromptGroup]:
    """Responses to a few of the config's prompts, or to random tokens without `rl.data`; on every rank. Collective."""
    context = min(cfg.rollout.max_context or 1 << 30, spec.max_position_embeddings)
    count, layout = max(PROMPTS, engine.layout.count), engine.layout
    if cfg.rl is not None:
        tokenizer = load_tokenizer(cfg.model.path, cfg.model.chat_template)
        longest = cfg.rl.max_prompt_tokens or context - cfg.rollout.max_response_tokens
        prompts = PromptSource(cfg.rl.data, tokenizer, cfg.seed, longest).next(count)
    else:
        draw = np.random.default_rng(cfg.seed)
        sizes = draw.integers(2, min(PROMPT_LENGTH, context // 2) + 1, count)
        drawn = [draw.integers(0, spec.vocab_size, size).tolist() for size in sizes]
        prompts = [Prompt(f"random/{i}", tuple(tokens), None) for i, tokens in enumerate(drawn)]
    sampling = Sampling(SAMPLES, cfg.rollout.max_response_tokens, cfg.rollout.temperature)
    own = engine.generate(prompts[layout.index :: layout.count], sampling, 0)
    own = own if mesh.rank % layout.tensor_parallel == 0 else []
    return [group for groups in mesh.all_gather_object(own) for group in groups]


def budget(batch: Batch, layout: BatchLayout) -> int:
    """Tokens of a packed row that make a few micro-batches a rank."""
    padded = [layout.padded(length) for length in batch.lengths.tolist()]
    wanted = max(max(padded), sum(padded) // (PARTS * layout.dp))
    return -(-wanted // layout.multiple) * layout.multiple


@dataclass
class LayerCount:
    """One MoE layer over the rows of all ranks that the engine routed."""

    rows: int = 0
    changed: int = 0  # experts of the engine that the learner's live routing does not choose
    pairs: int = 0  # rows with any
    margins: tuple[float, ...] = ()  # of the rows where the learner, given the engine's experts before, chooses others
    unexplained: int = 0  # of those: no near-tie, and not the learner's live routing either

    def plus(self, other: LayerCount) -> LayerCount:
        return LayerCount(
            self.rows + other.rows,
            self.changed + other.changed,
            self.pairs + other.pairs,
            tuple(sorted(self.margins + other.margins)),
            self.unexplained + other.unexplained,
        )


class RoutingCheck:
    """The comparisons of `verify_routing` on sampled micro-batches; every rank makes the same calls."""

    def __init__(self, cfg: Config, policy: Policy, packed: list[MicroBatch]) -> None:
        self.cfg, self.policy, self.mesh, self.packed = cfg, policy, policy.mesh, packed
        self.top_k = policy.spec.top_k
        self.is_exact = (cfg.model.dtype, cfg.rollout_dtype) == ("float32", "float32")
        self.most_changed = (cfg.rl or RL(data=[])).max_routing_mismatch

    def run(self) -> tuple[list[str], list[str]]:
        """(what was found, what is wrong), a line each; the same on every rank."""
        policy = self.policy
        live, routing = policy.read(self.packed)
        trained = self._training_pass()
        shares = replay_rollout(policy, self.packed)
        recorded = [micro.experts for micro in self.packed]
        policy.routing.margins = True
        given, given_routing = policy.read(self.packed)
        policy.routing.margins = False
        lines, problems = self.compare(recorded, routing, given_routing)
        share = self._reduced(shares)["routing/live_fraction"]
        lines.append(f"replayed: {1 - share:.1%} of positions; live: {share:.1%} (the engine never routes a last token)")
        replay_recorded(self.packed, routing)
        exact_lines, exact_problems = self.exact(live, routing, trained)
        for micro, experts in zip(self.packed, recorded, strict=True):
            micro.experts = experts
        return lines + exact_lines + self.gaps(live, given), problems + exact_problems

    def compare(
        self, recorded: Sequence[Tensor], live: Sequence[RowRouting], given: Sequence[RowRouting]
    ) -> tuple[list[str], list[str]]:
        """The engine's record against live routing, layer by layer, and against routing at the engine's own experts.

        A disagreement changes what later layers see. `given` routes behind the engine's experts, so that in it every
        disagreement stands for itself: in float32 it must be a near-tie, of one expert by less than `TIE`. Where a record
        is wrong that holds for the layers before it, and live routing for those after it.
        """
        layers, tokens = self._counted(recorded, live, given)
        lines = ["layer   experts    pairs  disagreements at the engine's experts, by margin in router logits"]
        problems = []
        for number, layer in layers.items():
            margins = ", ".join(f"{margin:.1e}" for margin in layer.margins[-LISTED:][::-1])
            more = f", {len(layer.margins) - LISTED} smaller" if len(layer.margins) > LISTED else ""
            found = f"{len(layer.margins)} of {layer.rows}" + (f": {margins}{more}" if margins else "")
            share = layer.changed / max(layer.rows * self.top_k, 1)
            lines.append(f"{number:5} {share:8.2%} {layer.pairs / max(layer.rows, 1):8.2%}  {found}")
            if self.is_exact and layer.unexplained:
                problems.append(
                    f"layer {number}: {layer.unexplained} of {layer.rows} tokens took other experts in the engine, and not by a "
                    f"near-tie (margins up to {layer.margins[-1]:.1e})"
                )
            elif share > self.most_changed:
                problems.append(
                    f"layer {number}: {share:.0%} of the engine's experts are not the learner's (rl.max_routing_mismatch = "
                    f"{self.most_changed:.0%})"
                )
        if problems:
            problems[-1] += ": rows or layers are misaligned, or the weights differ"
        near = sum(margin < TIE for layer in layers.values() for margin in layer.margins)
        lines.append(f"tokens with any difference: {tokens:.2%}; {near} disagreements are near-ties (below {TIE:.0e})")
        return lines, problems

    def _counted(
        self, recorded: Sequence[Tensor], live: Sequence[RowRouting], given: Sequence[RowRouting]
    ) -> tuple[dict[int, LayerCount], float]:
        """By layer, over all ranks, ascending; and the share of tokens whose live routing differs in any layer."""
        mine: dict[int, LayerCount] = {}
        any_layer = Mean(0.0, 0.0)
        numbers = [layer.number for layer in self.policy.routing.layers]
        for micro, experts, free, pinned in zip(self.packed, recorded, live, given, strict=True):
            mask = own_rows(micro.targets >= 0, self.mesh)  # all that the engine has routed
            drift = Drift.between(numbers, experts, free.stacked().cpu(), mask)
            local = Drift.between(numbers, experts, pinned.stacked().cpu(), mask)
            changed = changed_layers(drift, self.mesh)
            any_layer = any_layer.merge(Mean.of(changed > 0, drift.mask))
            for index, number in enumerate(numbers):
                differs, apart = drift.changed[index] > 0, local.changed[index] > 0
                margins = pinned.margins[index].cpu()
                tie = (local.changed[index] == 1) & (margins < TIE)
                count = LayerCount(
                    int(drift.mask.sum()),
                    int(drift.changed[index].sum()),
                    int(differs.sum()),
                    tuple(margins[apart].tolist()),
                    int((differs & apart & ~tie).sum()),
                )
                mine[number] = mine.get(number, LayerCount()).plus(count)
        layers: dict[int, LayerCount] = {}
        for rank in self.mesh.all_gather_object(mine):
            for number, count in rank.items():
                layers[number] = layers.get(number, LayerCount()).plus(count)
        return dict(sorted(layers.items())), self._reduced({"any": any_layer})["any"]

    def exact(
        self, live: Sequence[Tensor], routing: Sequence[RowRouting], trained: Sequence[Tensor]
    ) -> tuple[list[str], list[str]]:
        """With its own experts replayed the learner gives the log-probs of live routing, bit for bit, in both passes.

        `live` and `routing`: of the pass without gradients; `trained`: of the training pass.
        """
        again, replayed = self.policy.read(self.packed)
        expected = [values[micro.owned] for micro, values in zip(self.packed, live)]
        found = {
            "live in the training pass": trained,
            "replayed in the pass without gradients": [v[m.owned] for m, v in zip(self.packed, again)],
            "replayed in the training pass": self._training_pass(),
        }
        wrong = [name for name, values in found.items() if self.mesh.any(not _equal(values, expected))]
        if not wrong:
            return ["its own experts replayed: log-probs equal bit for bit, without gradients and in training"], []
        return [f"its own experts replayed: log-probs differ {' and '.join(wrong)}"], [
            f"with its own experts replayed the learner's log-probs differ {' and '.join(wrong)}, "
            f"{self._where_apart(routing, replayed)}"
        ]

    def _training_pass(self) -> list[Tensor]:
        """Log-probs `[m]` of the tokens this rank scores, as `train_step` has them; its loss of 0 moves no weight."""
        seen: list[Tensor] = []

        def loss(_batch: Batch, log_probs: Tensor, _entropy: Tensor, _shards: Any) -> tuple[Tensor, dict[str, Metric]]:
            seen.append(log_probs.detach().cpu())
            return 0.0 * log_probs.sum(), {}

        self.policy.train_step(self.packed, loss)
        return seen

    def _where_apart(self, first: Sequence[RowRouting], second: Sequence[RowRouting]) -> str:
        """The MoE layer after which the two passes differ: the one before the first router with other gates. Collective."""
        apart = [
            layer.number
            for layer in self.policy.routing.layers
            if any(not torch.equal(a.gates[layer.index], b.gates[layer.index]) for a, b in zip(first, second))
        ]
        numbers = [number for rank in self.mesh.all_gather_object(apart) for number in rank]
        before = [n for n in self.policy.spec.moe_layers if not numbers or n < min(numbers)]
        return f"from layer {before[-1]} on" if before else f"before layer {self.policy.spec.moe_layers[0]}"

    def gaps(self, live: Sequence[Tensor], given: Sequence[Tensor]) -> list[str]:
        """Where the gap to the engine's log-probs of the sampled tokens comes from."""
        with_live, with_given = self._gap(live), self._gap(given)
        lines = [
            f"log-prob gap to the engine: mean {with_live:.1e} with live routing, {with_given:.1e} with the engine's experts: "
            f"routing makes {with_live - with_given:.1e} of it, the rest {with_given:.1e}"
        ]
        if self.cfg.model.dtype != "bfloat16":
            return lines
        parameters = sum(p.numel() for chunk in self.policy.modules for p in chunk.parameters())
        if self.mesh.any(parameters > CHEAP):
            return [*lines, f"of the rest, precision: not measured (more than {CHEAP:,} parameters on a rank)"]
        precise = self._gap(self._in_float32())
        return [*lines, f"of the rest, the learner's precision makes {with_given - precise:.1e} (in float32: {precise:.1e})"]

    def _in_float32(self) -> list[Tensor]:
        """Log-probs of a float32 learner with the same weights, given the engine's experts."""
        model = self.cfg.model.model_copy(update={"dtype": "float32"})
        cfg = self.cfg.model_copy(update={"model": model})
        twin = Policy(self.policy.spec, cfg, self.mesh, temperature=self.policy.temperature, routing=True)
        for mine, other in zip(twin.modules, self.policy.modules, strict=True):
            for a, b in zip(mine.parameters(), other.parameters(), strict=True):
                a.data.copy_(b.data)
        return twin.read(self.packed)[0]

    def _gap(self, log_probs: Sequence[Tensor]) -> float:
        """Mean |learner - engine| over the sampled tokens of all ranks. Collective."""
        metrics: dict[str, Metric] = {}
        if self.mesh.reports:
            for micro, values in zip(self.packed, log_probs, strict=True):
                own = micro.local_batch()
                merge(metrics, {"gap": Mean.of((values[micro.owned] - own.rollout_log_probs).abs(), own.response_mask)})
        return self._reduced(metrics)["gap"]

    def _reduced(self, metrics: dict[str, Metric]) -> dict[str, float]:
        return reduce_metrics(metrics, self.mesh.all_gather_object)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))
