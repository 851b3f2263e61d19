"""`megarl verify precision`: what bfloat16 and each FP8 recipe do to a model, layer by layer, against float32."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarl import launcher
from megarl.config.schema import Config, Optimizer, Parallel
from megarl.convert import family, read_spec
from megarl.data import PromptSource, load_tokenizer, pack
from megarl.errors import BadInput, RunFailed
from megarl.learner.policy import Policy
from megarl.models.fp8 import RECIPES
from megarl.models.generate import ensure_checkpoint, spec_of
from megarl.models.layers.fp8_layers import check_skipped
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.trainers.losses import token_mean_loss
from megarl.types import Batch
from megarl.verify.layouts.model import shrunken, write_checkpoint

LARGEST = 100_000_000  # parameters of a model that is measured itself
SEQUENCES, LENGTH = 16, 64  # at most


@dataclass(frozen=True)
class Found:
    """What one precision makes of the batch."""

    hidden: list[Tensor]  # after each layer: [real tokens, H] float32
    log_probs: Tensor  # of the tokens that have one
    gradient: Tensor  # of their mean negative log-probability, all parameters


@dataclass(frozen=True)
class Gap:
    """A precision against float32."""

    layers: list[float]  # norm of the difference over the norm, of the hidden states after each layer
    mean: float  # of |difference| of log-probs, in nats
    max: float
    gradient: float  # norm of the difference over the norm

    @classmethod
    def of(cls, found: Found, exact: Found) -> Gap:
        difference = (found.log_probs - exact.log_probs).abs()
        layers = [_relative(a, b) for a, b in zip(found.hidden, exact.hidden, strict=True)]
        return cls(layers, float(difference.mean()), float(difference.max()), _relative(found.gradient, exact.gradient))

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (*self.layers, self.max, self.gradient)))

    @property
    def worst(self) -> tuple[int, float, float]:
        """The layer that adds most to the difference, and the difference before and after it."""
        steps = list(itertools.pairwise([0.0, *self.layers]))
        added = [after - before if math.isfinite(after) else math.inf for before, after in steps]
        layer = added.index(max(added))
        return layer, *steps[layer]


def verify_precision(cfg: Config) -> None:
    """Run the config's model, or a small one of its kind where it is too large, in every precision and print the table.

    One process. Raises RunFailed, naming the precision and layer, when a number is not finite, and BadInput when no layer
    is in FP8.
    """
    mesh = Mesh.build(Parallel())
    with tempfile.TemporaryDirectory(prefix="megarl-precision-") as scratch:
        cfg, path, title = _model(cfg, Path(scratch))
        spec = read_spec(path)
        batches = [_batch(cfg, spec, part) for part in (0, 1)]
        dtype = "bfloat16" if cfg.model.dtype == "bfloat16" else "float32"
        precisions = {"bfloat16": dict(dtype="bfloat16", fp8="none")}
        precisions |= {name: dict(dtype=dtype, fp8=name) for name in RECIPES}
        exact = _measure(cfg, path, mesh, batches, dict(dtype="float32", fp8="none"))
        gaps: dict[str, Gap] = {}
        notes = [f"FP8 recipes on top of {dtype}{_kept(cfg, spec)}"]
        for name, model in precisions.items():
            try:
                gaps[name] = Gap.of(_measure(cfg, path, mesh, batches, model), exact)
            except BadInput as e:  # sizes that the recipe cannot multiply
                notes.append(f"{name} left out: {e}")
    stream = launcher.terminal()
    if stream is not None:
        print("\n".join([title, *render(gaps), *notes]), file=stream, flush=True)
    broken = {name: gap.worst[0] for name, gap in gaps.items() if not gap.is_finite}
    if broken:
        named = ", ".join(f"{name} (layer {layer})" for name, layer in broken.items())
        way = "set model.dtype: float32" if "bfloat16" in broken else "keep layers out with model.fp8_skip_first and _last"
        raise RunFailed(f"verify precision: not finite in {named}; {way}")


def render(gaps: dict[str, Gap]) -> list[str]:
    """The lines of the table: a column for each precision, a row for each layer, and the layer that adds most."""
    width = max(map(len, gaps)) + 2
    lines = [f"{'difference to float32':24}" + "".join(f"{name:>{width}}" for name in gaps)]

    def row(what: str, numbers: list[float]) -> None:
        lines.append(f"{what:24}" + "".join(f"{number:{width}.1e}" for number in numbers))

    for layer in range(len(next(iter(gaps.values())).layers)):
        row(f"hidden after layer {layer}", [gap.layers[layer] for gap in gaps.values()])
    row("log-probs, mean (nats)", [gap.mean for gap in gaps.values()])
    row("log-probs, max (nats)", [gap.max for gap in gaps.values()])
    row("gradient", [gap.gradient for gap in gaps.values()])
    for name, gap in gaps.items():
        layer, before, after = gap.worst
        lines.append(f"{name}: layer {layer} adds most ({before:.1e} -> {after:.1e})")
    return lines


def _measure(cfg: Config, path: Path, mesh: Mesh, batches: list[Batch], model: dict[str, str]) -> Found:
    """The second batch; the first one gives delayed scales a past."""
    own = model | {"fp8_params": False}  # the same numbers, and not of every recipe
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=own), "parallel": Parallel()})
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-9, clip_grad=0.0))
    before, packed = (pack(batch, range(len(batch)), policy.layout) for batch in batches)
    if policy.fp8 is not None:
        with policy.fp8.calibrating():
            policy.log_probs([before])
        policy.fp8.advance()
    real = packed.held >= 0
    with _hidden_states(policy) as hidden:
        log_probs, _ = policy.log_probs([packed])
    states = [state[real, 0].float() for state in hidden]
    policy.train_step([packed], token_mean_loss)
    gradient = torch.cat([p.main_grad.float().flatten() for chunk in policy.chunks for p in chunk.parameters()])
    return Found(states, log_probs[0][packed.batch.response_mask > 0].float(), gradient)


@contextmanager
def _hidden_states(policy: Policy) -> Iterator[list[Tensor]]:
    """What the layers put out in the block, in their order."""
    out: list[Tensor] = []
    layers = [layer for module in policy.modules for layer in module.decoder.layers]
    hooks = [layer.register_forward_hook(lambda _layer, _args, result: out.append(result[0].detach())) for layer in layers]
    try:
        yield out
    finally:
        for hook in hooks:
            hook.remove()


def _model(cfg: Config, scratch: Path) -> tuple[Config, Path, str]:
    """The config to measure, the folder to read, and what to say of it."""
    path = Path(cfg.model.path)
    spec = read_spec(path) if (path / "config.json").exists() else spec_of(cfg.model.generate)
    check_skipped(cfg.model, spec)
    parameters = sum(math.prod(shape) for shape in family(spec.family).hf_shapes(spec).values())
    if parameters <= LARGEST:
        ensure_checkpoint(cfg.model)
        return cfg, path, f"{path}: {parameters / 1e6:.1f}M parameters"
    small = _small(shrunken(cfg))
    write_checkpoint(scratch / "model", small, cfg.seed)
    kind = f"a random {spec.family} of {small.num_layers} layers, hidden {small.hidden_size}"
    # of so few layers one at each end
    kept = {name: min(getattr(cfg.model, name), 1) for name in ("fp8_skip_first", "fp8_skip_last")}
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=kept)})
    title = f"{path}: {parameters / 1e9:.1f}B parameters are too many here; {kind} in its place"
    return cfg, scratch / "model", title


def _small(spec: ModelSpec) -> ModelSpec:
    """Of a `shrunken` one, the same with widths that every recipe can multiply."""
    widths = dict(hidden_size=128, intermediate_size=256, shared_width=128 if spec.shared_width else 0)
    if spec.is_moe:
        widths |= dict(moe_intermediate_size=128)
    heads = dict(head_dim=32)
    if spec.kv_lora_rank:
        ranks = dict(q_lora_rank=128 if spec.q_lora_rank else 0, kv_lora_rank=128)
        heads = ranks | dict(head_dim=64, nope_head_dim=32, rope_head_dim=32, v_head_dim=32)
    rotated = 32 if spec.kv_lora_rank else spec.rope.width * 32 // spec.head_dim
    return replace(spec, **widths, **heads, rope=replace(spec.rope, width=rotated))


def _batch(cfg: Config, spec: ModelSpec, part: int) -> Batch:
    """Prompts of the config's RL data, or random tokens where there are none."""
    longest = min(LENGTH, spec.max_position_embeddings)
    path = Path(cfg.model.path)
    if cfg.rl is not None and (path / "tokenizer_config.json").exists():
        source = PromptSource(cfg.rl.data, load_tokenizer(path, cfg.model.chat_template), cfg.seed + part, longest)
        rows = [[token % spec.vocab_size for token in prompt.token_ids] for prompt in source.next(SEQUENCES)]
    else:
        draw = torch.Generator().manual_seed(cfg.seed + part)
        sizes = torch.randint(2, longest + 1, (SEQUENCES,), generator=draw).tolist()
        rows = [torch.randint(0, spec.vocab_size, (size,), generator=draw).tolist() for size in sizes]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row])
    batch = Batch(tokens, lengths, torch.ones(len(tokens)))
    batch.response_mask[batch.offsets()[:-1]] = 0
    return batch.replace(token_weights=batch.response_mask / batch.response_mask.sum())


def _kept(cfg: Config, spec: ModelSpec) -> str:
    """What is said of the layers whose products are not in FP8."""
    first, last = cfg.model.fp8_skip_first, cfg.model.fp8_skip_last
    kept = [layer for layer in range(spec.num_layers) if layer < first or layer >= spec.num_layers - last]
    return f"; {'layer' if len(kept) == 1 else 'layers'} {', '.join(map(str, kept))} without FP8" if kept else ""


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
