"""Run by the ranks of `test_te_provider.py`: the te provider on the stand-in."""

from __future__ import annotations

from typing import Any

import torch

from tests.dist import te_stand_in

te_stand_in.install()

from megarl.config.schema import Config, Model, Optimizer  # noqa: E402
from megarl.data.packing import micro_batches  # noqa: E402
from megarl.errors import BadInput  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.models.layers import te_layers  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402
from megarl.platform import features  # noqa: E402
from megarl.verify import doctor  # noqa: E402
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood  # noqa: E402
from tests.dist.provider_cases import agree, cross_load, policy_of, torn_down  # noqa: E402

__all__ = ["agree", "cross_load"]

features.transformer_engine_problem = lambda: None  # there is no CUDA device
te_layers.ATTENTION_DTYPES = (torch.float32,)  # the numbers are compared in float32


def fp8(path: str, **settings: Any) -> dict[str, Any]:
    """One step in bfloat16 with FP8: by layer and linear, whether its product was in FP8; rows that are 0 everywhere."""
    te_stand_in.products.clear(), te_stand_in.recipes.clear()
    cfg = Config(model=Model(path=path, layers="te", dtype="bfloat16", **settings))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
    names = {m: n for chunk in policy.modules for n, m in chunk.named_modules()}
    (packed,) = micro_batches(fixed_batch(), 400, policy.layout)
    te_stand_in.watching = True
    policy.train_step([packed], negative_log_likelihood)
    with policy.fp8.suspended():
        before = len(te_stand_in.products)
        policy.log_probs([packed])
    te_stand_in.watching = False
    padding = int((packed.held < 0).sum())
    dense = [(names[m], z) for m, z, _ in te_stand_in.products[:before] if ".experts." not in names[m]]
    return {
        "in_fp8": sorted({names[m] for m, _, inside in te_stand_in.products[:before] if inside}),
        "outside": sorted({names[m] for m, _, inside in te_stand_in.products[:before] if not inside}),
        "suspended": any(inside for _, _, inside in te_stand_in.products[before:]),
        "padding": padding,
        "zero_rows": sorted({n for n, z in dense if bool(z[packed.held >= 0].any()) or int(z.sum()) != padding}),
        "recipes": [{k: str(v) for k, v in recipe.items()} for recipe in te_stand_in.recipes[:1]],
        "rows": packed.tokens.numel(),
    }


def refusals(path: str) -> list[str]:
    """One line each, of settings that the chip or the sizes of the stand-in cannot have."""
    out = []
    wrong: list[dict[str, Any]] = [
        dict(dtype="float64"),
        dict(dtype="float32", fp8="tensorwise"),
        dict(dtype="bfloat16", fp8="mxfp8"),
        dict(dtype="bfloat16", fp8="delayed", fp8_skip_first=1),
        dict(dtype="bfloat16", fp8="blockwise"),
    ]
    for settings in wrong:
        cfg = Config(model=Model(path=path, layers="te", **settings))
        try:
            Policy.from_hf(path, cfg, Mesh.build(cfg.parallel))
        except BadInput as error:
            out.append(str(error))
        torn_down()
    from transformer_engine.common import recipe

    block, recipe.Float8BlockScaling = recipe.Float8BlockScaling, None
    del recipe.Float8BlockScaling
    out.append(str(features.recipe_problem("blockwise")))
    recipe.Float8BlockScaling = block
    return [*out, doctor._layers()]


# public name, method, what it calls an argument, what another release might call it
RENAMED = [
    ("Linear", "__init__", "out_features", "outputs"),
    ("Linear", "forward", "is_first_microbatch", "is_first"),
    ("LayerNormLinear", "__init__", "eps", "epsilon"),
    ("GroupedLinear", "__init__", "num_gemms", "groups"),
    ("RMSNorm", "__init__", "hidden_size", "width"),
    ("DotProductAttention", "__init__", "num_gqa_groups", "num_kv_heads"),
    ("DotProductAttention", "forward", "cu_seqlens_q", "cu_seqlens"),
]


def renamed(path: str) -> dict[str, str]:
    """What a policy meets when one argument, then one parameter, has another name than in the table."""
    out = {}
    for kind, method, old, new in RENAMED:
        owner, name = getattr(te_stand_in, kind), f"transformer_engine.pytorch.{kind}"
        text = te_stand_in.TABLE[name][method]
        assert f" {old}" in text
        before = owner.__dict__[method]
        other = text.replace(f" {old}=", f" {new}=").replace(f" {old},", f" {new},")
        setattr(owner, method, te_stand_in._bound(other, before.plain))
        out[f"{kind}.{method} {old}"] = _failure(path)
        setattr(owner, method, before)
    parameters = te_stand_in.TABLE["transformer_engine.pytorch.LayerNormLinear"]["parameters"]
    parameters["norm_weight"] = parameters.pop("layer_norm_weight")
    out["parameter"] = _failure(path)
    parameters["layer_norm_weight"] = parameters.pop("norm_weight")
    out["none"] = _failure(path)
    return out


def _failure(path: str) -> str:
    try:
        policy = policy_of(path, "te", {}, train=False)
        policy.log_probs(micro_batches(fixed_batch(), 400, policy.layout))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torn_down()
    return ""
