"""vLLM as the rollout engine, inside the training ranks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megarl.config.schema import Rollout
from megarl.convert import family, read_spec
from megarl.convert.encodings import QUANTISED
from megarl.convert.hf_io import read_config
from megarl.errors import BadInput, RunFailed
from megarl.platform import vllm_fp8, vllm_patches
from megarl.platform.vllm_direct import Direct, Stretch, take_on
from megarl.rollout.engine import Capabilities, EngineLayout, Sampling, sample_seed
from megarl.rollout.engine_shards import Box, EngineDegrees
from megarl.rollout.exchange import Moved
from megarl.rollout.fp8_weights import Fp8Weights, factors_name
from megarl.rollout.served import check_served, overrides
from megarl.rollout.sync_plan import Run
from megarl.types import Prompt, PromptGroup, Trajectory

if TYPE_CHECKING:
    from megarl.parallel import Mesh

LARGEST_LOG_PROB = 1e-3  # rounding
GREEDY_BELOW = 1e-5  # vLLM's own border


@dataclass(slots=True)
class Response:
    """What vLLM has sampled for one request."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    routed_experts: list[np.ndarray] = field(default_factory=list)  # each [tokens, L, k]
    finish_reason: str = ""


class VLLMEngine:
    """An `Engine` on the ranks of `mesh`: every `tensor_parallel` consecutive ranks hold one replica of the model.

    `data_parallel` consecutive replicas are one vLLM engine: each samples prompts of its own, but they share their
    experts, so all of them step together, those without a prompt left too. Every rank makes the same calls.

    `model_path` is a Hugging Face checkpoint. With `load=False` only its config and tokenizer are read and the weights
    stay random until the first `load_weights`. torch.distributed must be initialised. `fp8`: the weights that the engine
    has in FP8, which it gets by a sync only, so with `load=False`.
    Raises BadInput when the world does not divide by an engine's ranks or the checkpoint cannot be served.
    """

    def __init__(
        self,
        model_path: str,
        rollout_cfg: Rollout,
        dtype: str,
        seed: int,
        mesh: Mesh,
        load: bool = True,
        fp8: Fp8Weights | None = None,
        head_dtype: str | None = None,
    ) -> None:
        degree, ranks = rollout_cfg.tensor_parallel, rollout_cfg.tensor_parallel * rollout_cfg.data_parallel
        if mesh.world_size % ranks:
            raise BadInput(
                f"rollout.tensor_parallel={degree} x data_parallel={rollout_cfg.data_parallel} does not divide the world "
                f"size {mesh.world_size}: set divisors of it"
            )
        self.seed, self.policy_version, self.config = seed, 0, rollout_cfg
        self.layout = EngineLayout(degree, mesh.world_size // degree, mesh.rank // degree)
        self.capabilities = Capabilities(sleep=vllm_patches.can_sleep(), routed_experts=rollout_cfg.routed_experts)
        self._spec, self.fp8 = read_spec(model_path), fp8
        self.dtype, self.degrees = dtype, EngineDegrees(degree, rollout_cfg.data_parallel, rollout_cfg.expert_parallel)
        if fp8 is not None:
            fp8.check(self.degrees)
            os.environ.update({key: os.environ.get(key, value) for key, value in vllm_fp8.environment().items()})
        for key, value in vllm_patches.environment().items():
            os.environ.setdefault(key, value)
        with vllm_patches.starting(mesh.rank % ranks, mesh.local_rank):
            self._llm = self._start(model_path, dtype, load, head_dtype)
        vllm_patches.after_start(self._runner)
        if rollout_cfg.routed_experts:
            self._check_record()
        self._direct, self.reload_reason = self._take_on(mesh)
        self._stretches: dict[Run, list[Stretch]] = {}  # where the runs of a plan go
        self._requests = 0
        self._max_tokens = self._llm.llm_engine.model_config.max_model_len
        self._tokenizer = _tokenizer(model_path)
        self._stop_ids = stop_token_ids(model_path, self._tokenizer)

    def _start(self, model_path: str, dtype: str, load: bool, head_dtype: str | None) -> Any:
        from vllm import LLM

        vllm_patches.install()
        cfg, spec = self.config, self._spec
        check_served(spec, model_path, vllm_patches.head_sizes(latent=spec.kv_lora_rank > 0))
        if cfg.routed_experts and not vllm_patches.records_routing():
            raise BadInput(
                f"rollout.routed_experts = true: vLLM {vllm_patches.version()} does not record experts; install 0.30, "
                "or set it to false and rl.routing_replay to none or old"
            )
        changes = overrides(spec, read_config(model_path), head_dtype)
        if self.fp8 is not None:
            precisions = [str(known).removeprefix("torch.") for known in vllm_fp8.precisions()]
            if dtype not in precisions:
                raise BadInput(
                    f"rollout.fp8 = 'blockwise': vLLM has FP8 layers beside {' or '.join(precisions)} here, not {dtype}; set "
                    f"rollout.dtype: {precisions[0]}"
                )
            changes |= {QUANTISED: self.fp8.config()}
        try:
            return LLM(
                model_path,
                trust_remote_code=False,
                hf_overrides=changes,
                dtype=dtype,
                seed=self.seed,
                tensor_parallel_size=cfg.tensor_parallel,
                data_parallel_size=cfg.data_parallel,
                enable_expert_parallel=cfg.expert_parallel,
                distributed_executor_backend="external_launcher",
                load_format="auto" if load else "dummy",
                max_model_len=cfg.max_context,
                max_num_seqs=cfg.max_concurrent,
                max_num_batched_tokens=max(8192, cfg.max_context or 0),
                enable_chunked_prefill=True,
                enable_prefix_caching=True,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                enable_return_routed_experts=cfg.routed_experts,
                disable_log_stats=True,
                **vllm_patches.engine_arguments(cfg.kv_cache_gib, cfg.gpu_memory_utilization, cfg.data_parallel),
            )
        except ValueError as error:
            raise BadInput(f"vLLM cannot serve {model_path}: {_one_line(error)}") from error

    def _take_on(self, mesh: Mesh) -> tuple[Direct | None, str | None]:
        """What this rank's weights are written into; or, on every rank, why full tensors have to be reloaded."""
        hosted = self.degrees.hosted(self._spec, mesh.rank)
        names = frozenset(family(self._spec.family).hf_shapes(self._spec))
        if self.fp8 is not None:
            hosted, names = self.fp8.with_factors(hosted), names | {factors_name(name) for name in self.fp8.coded}
        direct = take_on(self.model, hosted, names)
        reasons = [reason for reason in mesh.all_gather_object(direct if isinstance(direct, str) else None) if reason]
        return (None, reasons[0]) if reasons else (direct, None)

    def _check_record(self) -> None:
        """Raises BadInput when the engine will not record the experts that the learner has."""
        recorded, spec = vllm_patches.recorded_routing(self._runner), self._spec
        moe = len(spec.moe_layers)
        if recorded not in ((moe, spec.top_k), (spec.num_layers, spec.top_k)):
            what = "nothing" if recorded is None else f"{recorded[0]} layers with {recorded[1]} experts a token"
            raise BadInput(
                f"rollout.routed_experts = true: vLLM {vllm_patches.version()} records {what}, the learner has {moe} MoE "
                f"layers of {spec.num_layers} with {spec.top_k}; set it to false and rl.routing_replay to none or old"
            )

    def generate(self, prompts: list[Prompt], sampling: Sampling, round_id: int) -> list[PromptGroup]:
        """Sample every prompt `sampling.samples` times; each sample has a seed of its own.

        A response ends at an end token (kept, `finish_reason="stop"`), at `max_tokens` or at the end of the context
        ("length"). Raises BadInput for a prompt that leaves no room for a token.
        """
        for prompt in prompts:
            if len(prompt.token_ids) >= self._max_tokens:
                raise BadInput(
                    f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens and the engine's context is "
                    f"{self._max_tokens}: set rollout.max_context above it or rl.max_prompt_tokens below"
                )
        params = self._params(sampling)
        responses = self._sample(
            [
                (
                    prompt.token_ids,
                    vllm_patches.seeded(params, sample_seed(self.seed, prompt.prompt_id, index, round_id)),
                )
                for prompt in prompts
                for index in range(sampling.samples)
            ]
        )
        texts = self._decode(responses)
        groups = []
        for i, prompt in enumerate(prompts):
            group_id = f"{prompt.prompt_id}@{round_id}"
            rows = range(i * sampling.samples, (i + 1) * sampling.samples)
            trajectories = [self._trajectory(group_id, j - rows.start, prompt, responses[j], texts[j]) for j in rows]
            groups.append(PromptGroup(group_id, prompt, trajectories))
        return groups

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature,
            logprobs=0 if sampling.log_probs else None,
            detokenize=False,
            stop_token_ids=self._stop_ids,
        )

    def _sample(self, requests: list[tuple[tuple[int, ...], Any]]) -> list[Response]:
        """Run (prompt tokens, vLLM's parameters) to their ends, in order.

        Talks to vLLM's engine core: `LLM.generate` copies and checks each request and keeps text and statistics of it,
        which for short responses takes a tenth of the time.
        """
        from vllm.v1.engine import EngineCoreRequest

        core = self._llm.llm_engine.engine_core
        running: dict[str, Response] = {}
        responses = []
        try:
            for tokens, params in requests:
                self._requests += 1
                name = f"sample-{self._requests}"
                core.add_request(EngineCoreRequest(name, list(tokens), None, params, None, 0.0, None, None, None))
                running[name] = Response()
                responses.append(running[name])
            while self._any_replica(bool(running)):
                if not running:
                    core.execute_dummy_batch()  # for the experts that this replica holds for the others
                    continue
                for output in core.get_output().outputs:
                    _extend(running[output.request_id], output)
                    if output.finished:
                        del running[output.request_id]
        finally:
            core.abort_requests(list(running))  # of a call that was interrupted
        return responses

    def _any_replica(self, flag: bool) -> bool:
        """Whether any replica of this engine says true; collective over its ranks, once before every step."""
        if self.config.data_parallel == 1:
            return flag
        engine = self._llm.llm_engine
        return engine.vllm_config.parallel_config.has_unfinished_dp(engine.dp_group, flag)

    def _trajectory(self, group_id: str, index: int, prompt: Prompt, response: Response, text: str) -> Trajectory:
        check_response(response, self._spec.vocab_size)
        tokens = response.token_ids
        log_probs = response.log_probs or [np.nan] * len(tokens)
        return Trajectory(
            group_id=group_id,
            sample_index=index,
            prompt_ids=list(prompt.token_ids),
            response_ids=tokens,
            response_mask=np.ones(len(tokens), np.uint8),
            rollout_log_probs=np.asarray(log_probs, np.float32),
            finish_reason=response.finish_reason,
            policy_version=np.full(len(tokens), self.policy_version, np.int32),
            text=text,
            routed_experts=self._moe_rows(response.routed_experts),
        )

    def _moe_rows(self, pieces: list[np.ndarray]) -> np.ndarray | None:
        """[tokens, L, k] of the model's L MoE layers; vLLM may count the dense ones too."""
        if not pieces:
            return None
        rows, moe = np.concatenate(pieces), list(self._spec.moe_layers)
        return rows[:, moe] if rows.shape[1] == self._spec.num_layers else rows

    def _decode(self, responses: list[Response]) -> list[str]:
        ends = set(self._stop_ids)
        bare = [r.token_ids[:-1] if r.token_ids and r.token_ids[-1] in ends else r.token_ids for r in responses]
        return self._tokenizer.batch_decode(bare) if bare else []

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Log-prob of every token given the ones before, at temperature 1: [len(sequence)] float32; entry 0 is 0.

        Raises BadInput for a sequence that fills the whole context, since vLLM always samples one token more.
        """
        from vllm import SamplingParams

        for sequence in sequences:
            if len(sequence) >= self._max_tokens:
                raise BadInput(
                    f"a sequence of {len(sequence)} tokens cannot be scored in a context of {self._max_tokens}"
                )
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        requests = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._llm.generate(requests, params, use_tqdm=False) if self._any_replica(bool(requests)) else []
        return [np.asarray([0.0, *output.prompt_logprobs.logprobs], np.float32) for output in outputs]

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replace every weight by the named tensors of the stream, then drop the prefix cache.

        The stream may reuse its buffers after it is asked for the next tensor: each tensor is copied once, and copies
        live until their layer is complete. Raises RunFailed when vLLM refuses a tensor.
        """
        with self._new_weights(policy_version):
            vllm_patches.load_weights(self._runner, self._direct, tensors)

    def write_weights(self, blocks: Iterable[Moved], policy_version: int) -> None:
        """`load_weights` of the pieces that this rank hosts, block by block; for engines without a `reload_reason`.

        Raises RunFailed when a piece has no place here or something stays without new weights.
        """
        with self._new_weights(policy_version), self._direct.loading(everything=True):
            for run, values in (pair for block in blocks for pair in block):
                if run not in self._stretches:
                    parts = [(piece.entry.hf_name, piece.target, piece.shape) for piece in run.pieces]
                    self._stretches[run] = self._direct.stretches(parts)
                self._direct.write_stretches(self._stretches[run], values)

    @contextlib.contextmanager
    def _new_weights(self, policy_version: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise RunFailed(f"weight sync: vLLM refused the learner's weights: {_one_line(error)}") from error
        self.reset_prefix_cache()
        self.policy_version = policy_version

    def hosted_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, what this rank hosts of it), as the engine computes with it; without a `reload_reason`."""
        return ((name, self._direct.read(name)) for name in self._direct.hosted)

    def hosted_weight(self, name: str) -> tuple[Box, Tensor] | None:
        """The part of a tensor that this rank hosts, and its values; none for others, and with a `reload_reason`."""
        if self._direct is None or name not in self._direct.hosted:
            return None
        return self._direct.hosted[name], self._direct.read(name)

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier requests. Raises RunFailed if requests are still running."""
        if not self._llm.reset_prefix_cache():
            raise RunFailed("weight sync: vLLM could not drop its prefix cache because requests are still running")

    @property
    def cached_blocks(self) -> int:
        """Blocks of keys and values that a later request could reuse."""
        core = self._llm.llm_engine.engine_core.engine_core
        return len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    def sleep(self, level: int = 1) -> None:
        self._llm.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        self._llm.wake_up(tags)

    def memory(self) -> dict[str, tuple[int, int]]:
        weights, cache = vllm_patches.memory(self._runner)
        if self._direct is not None:
            weights = weights[0], weights[1] + self._direct.hidden_bytes()
        return {"weights": weights, "kv_cache": cache}

    @property
    def rng_state(self) -> dict[str, Any]:
        """The run's seed: every sample's own seed derives from it, so there is no generator to save."""
        return {"seed": self.seed}

    @property
    def model(self) -> torch.nn.Module:
        """This rank's vLLM model, for comparing its weights with the learner's."""
        return self._runner.get_model()

    @property
    def probe_length(self) -> int:
        """A length for `weight_sync.make_probes` that `score` accepts in this context."""
        return min(48, self._max_tokens - 1)

    @property
    def vllm_config(self) -> Any:
        return self._llm.llm_engine.vllm_config

    @property
    def _runner(self) -> Any:
        worker = self._llm.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner


def _extend(response: Response, output: Any) -> None:
    response.token_ids += output.new_token_ids
    if output.new_logprobs is not None:
        response.log_probs += output.new_logprobs.logprobs[:, 0].tolist()
    if output.routed_experts is not None:
        response.routed_experts.append(output.routed_experts)
    if output.finished:
        response.finish_reason = str(output.finish_reason)


def check_response(response: Response, vocab_size: int) -> None:
    """Raises RunFailed for what no sampling gives: a wrong count, a token outside the vocabulary, a log-prob above 0."""
    tokens, log_probs = np.asarray(response.token_ids), np.asarray(response.log_probs, np.float64)
    what = None
    if not len(tokens) or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab_size:
        what = f"{len(tokens)} tokens, not all of them within 0 .. {vocab_size - 1}"
    elif log_probs.shape not in ((0,), tokens.shape):
        what = f"{len(log_probs)} log-probs of {len(tokens)} tokens"
    elif not (log_probs <= LARGEST_LOG_PROB).all():  # nan is not either
        what = f"the log-prob {log_probs[~(log_probs <= LARGEST_LOG_PROB)][0]}"
    elif response.finish_reason not in ("stop", "length"):
        what = f"the end {response.finish_reason!r:.40}"
    elif any(rows.ndim != 3 or rows.shape[1:] != response.routed_experts[0].shape[1:] for rows in response.routed_experts):
        what = f"routed experts of shapes {[rows.shape for rows in response.routed_experts]}"
    if what is not None:
        raise RunFailed(f"rollout: vLLM returned {what}; its version or its weights are broken (megarl verify sync)")


def stop_token_ids(model_path: str, tokenizer: Any) -> list[int]:
    """The end tokens of a checkpoint: those of generation_config.json, config.json and the tokenizer together."""
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return sorted(ids - {None})


def _tokenizer(model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
