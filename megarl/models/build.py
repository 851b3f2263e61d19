"""`ModelSpec` -> Megatron-core `GPTModel` through a layer provider."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megarl import platform
from megarl.config.schema import Model, Parallel
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh

platform.setup()

from megatron.core.activations import quick_gelu  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megarl.models.layers.latent_attention import LatentAttention  # noqa: E402
from megarl.models.layers.lm_head import LMHead  # noqa: E402
from megarl.models.layers.provider import Layers, choose, layers_of  # noqa: E402
from megarl.models.layers.scalar_head import ScalarHead  # noqa: E402
from megarl.models.layers.te_fp8 import fp8_settings  # noqa: E402
from megarl.models.layers.torch_layers import PackedAttention  # noqa: E402
from megarl.models.moe.biased_experts import LIMIT  # noqa: E402
from megarl.models.moe.groups import limit_groups  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ROUTER_DTYPES = {"float32": "fp32", "float64": "fp64"}


def transformer_config(
    spec: ModelSpec, model: Model, mesh: Mesh, parallel: Parallel, aux_loss_coef: float = 0.0
) -> TransformerConfig:
    """Megarl's `model` and `parallel` sections for `spec` on the layout of `mesh`, as Megatron's configuration.

    `aux_loss_coef`: of the load balancing loss (Switch Transformer, arXiv 2101.03961) of each packed row; 0: none.
    """
    dtype = DTYPES[model.dtype]
    moe: dict[str, Any] = {}
    if spec.is_moe:
        moe = dict(
            num_moe_experts=spec.num_experts,
            moe_router_topk=spec.top_k,
            moe_ffn_hidden_size=spec.moe_intermediate_size,
            moe_layer_freq=[int(layer in spec.moe_layers) for layer in range(spec.num_layers)],
            moe_router_pre_softmax=not spec.norm_topk_prob,
            moe_shared_expert_intermediate_size=spec.shared_width or None,
            moe_shared_expert_gate=spec.shared_gate,
            moe_router_score_function=spec.router_score,
            moe_router_topk_scaling_factor=None if spec.router_scaling == 1 else spec.router_scaling,
            moe_router_enable_expert_bias=spec.selection_bias,
            moe_router_bias_update_rate=0.0,  # the bias is the checkpoint's
            moe_router_load_balancing_type="aux_loss" if aux_loss_coef else "none",
            moe_aux_loss_coeff=aux_loss_coef,
            # the router computes at least as precisely as the rest
            moe_router_dtype=ROUTER_DTYPES["float64" if model.dtype == "float64" else model.router_dtype],
            moe_grouped_gemm=False,
        )
    is_te = choose(model).name == "te"
    # Transformer Engine's norms keep no more than their input, and most are inside a linear
    norms = [] if is_te else ["layernorm"]
    recompute = dict(
        none={},
        selective=dict(recompute_granularity="selective", recompute_modules=[*norms, "mlp", "moe"]),
        full=dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    )[parallel.recompute]
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm == "head",
        gated_linear_unit=True,
        **_activation(spec),
        add_bias_linear=spec.expert_bias,  # of the routers and experts; attention asks the spec
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # every weight is loaded from a checkpoint, but initialisation is where Megatron marks a weight as sharded over
        # tp, and an unmarked shard is left out of the gradient norm on all ranks but the first
        perform_initialization=True,
        tensor_model_parallel_size=mesh.tp,
        sequence_parallel=mesh.tp > 1,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        account_for_embedding_in_pipeline_split=parallel.embedding_in_split,
        account_for_loss_in_pipeline_split=parallel.loss_in_split,
        context_parallel_size=mesh.cp,
        # a dense model beside an MoE one, such as its reward model, is whole on every expert-parallel rank
        expert_model_parallel_size=mesh.ep if spec.is_moe else 1,
        expert_tensor_parallel_size=mesh.etp if spec.is_moe else 1,
        # Megatron checks the dispatcher of a dense model too, and its default refuses variable lengths
        moe_token_dispatcher_type=parallel.dispatcher if spec.is_moe else "alltoall",
        # with two stages and virtual stages the batched send/receive pairs the wrong messages, without an error
        overlap_p2p_comm=bool(mesh.vpp and mesh.vpp > 1),
        batch_p2p_comm=not (mesh.vpp and mesh.vpp > 1),
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **moe,
        **recompute,
        **(fp8_settings(model) if is_te else {}),
    )
    # micro-batches are packed to different lengths; set here since Megatron refuses it together with the all-gather
    # dispatcher, whose own condition, equal lengths on all expert-parallel ranks, `BatchLayout.equal_rows` keeps
    config.variable_seq_lengths = mesh.pp > 1
    return config


def _activation(spec: ModelSpec) -> dict[str, Any]:
    """Of Megarl's own experts it is in the module; Megatron's grouped experts and its MLPs read these."""
    if spec.activation == "clamped_swiglu":  # gpt-oss's constants, which Megatron's quick_gelu has inside
        return dict(activation_func=quick_gelu, activation_func_clamp_value=LIMIT, glu_linear_offset=1.0)
    return dict(activation_func=F.silu)


def _layer_spec(spec: ModelSpec, is_moe: bool, layers: Layers) -> ModuleSpec:
    if is_moe:
        mlp = layers.moe
    else:
        linears = MLPSubmodules(linear_fc1=layers.norm_column or layers.column, linear_fc2=layers.row)
        mlp = ModuleSpec(module=MLP, submodules=linears)
    inside = IdentityOp if layers.norm_column else layers.norm  # of a norm with one linear after it
    attention = LatentAttention if spec.kv_lora_rank else PackedAttention
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layers.norm if spec.kv_lora_rank else inside,
            self_attention=ModuleSpec(module=attention, params={"spec": spec, "layers": layers}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=layers.norm if is_moe else inside,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(layers.shard_names),
        ),
    )


def build_model(
    spec: ModelSpec, model: Model, mesh: Mesh, parallel: Parallel, aux_loss_coef: float = 0.0
) -> list[GPTModel]:
    """This rank's chunks of the model (one, or one per virtual stage), with uninitialised weights.

    The last stage ends in an `LMHead` and outputs hidden states `[1, n, H]`; with `spec.head == "scalar"`, in a
    `ScalarHead` of zeros that shares nothing with the embedding, and outputs `[1, n, 1]`.
    Raises BadInput when the layer provider is not available.
    """
    choice = choose(model)
    provider = layers_of(choice.name)
    if model.fp8_params and model.fp8 != "none" and choice.name != "te":
        raise BadInput(
            f"model.fp8_params = true: only Transformer Engine's layers keep weights in FP8 ({choice.why}); set "
            "model.fp8_params: false, PyTorch's round the same weights to the same numbers at every product"
        )
    if spec.expert_bias and mesh.etp > 1:
        raise BadInput(
            f"parallel.etp = {mesh.etp}: the experts of {spec.family} have biases, which cannot be shared out; "
            "set parallel.etp: 1 and use parallel.ep"
        )
    config = transformer_config(spec, model, mesh, parallel, aux_loss_coef)
    model_parallel_cuda_manual_seed(1)
    chunks = []
    for stage in range(mesh.vpp or 1):
        vp_stage = stage if mesh.vpp else None
        first = mesh.pp_rank == 0 and stage == 0
        last = mesh.is_last_stage and stage == (mesh.vpp or 1) - 1
        offset = get_transformer_layer_offset(config, vp_stage, mesh.pp_rank)
        count = get_num_layers_to_build(config, vp_stage, mesh.pp_rank)
        layers = [_layer_spec(spec, offset + i in spec.moe_layers, provider) for i in range(count)]
        chunk = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.norm),
            vocab_size=spec.padded_vocab_size(mesh.tp),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tie_embeddings and spec.head == "lm",
            position_embedding_type="none",  # the attention applies rotary positions from the packed row
            vp_stage=vp_stage,
        )
        if last:
            scalar = spec.head == "scalar"
            chunk.output_layer = ScalarHead(config, mesh.tp_group) if scalar else LMHead(chunk.output_layer)
        if spec.router_groups > 1:
            limit_groups(chunk, spec)
        chunks.append(chunk.to(platform.device()))
    return chunks
