"""Every setting, its type, its default and its meaning: the docstring under a field is what `megarl config` prints.

No torch in here: a configuration is checked before anything heavy is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def may_be_unset(field: Any) -> bool:
    """Whether the model field accepts None and has no value of its own called `none`."""
    if field is None or type(None) not in get_args(field.annotation):
        return False
    return not any(get_origin(a) is Literal and "none" in get_args(a) for a in get_args(field.annotation))


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """`none` unsets a field that may be unset; a section given in part keeps the other defaults of its place."""
        if not isinstance(data, dict):
            return data
        out = {}
        for key, value in data.items():
            field = cls.model_fields.get(key)
            if value == "none" and may_be_unset(field):
                value = None
            elif isinstance(value, dict) and field is not None and isinstance(field.default, Section):
                value = field.default.model_dump(exclude_unset=True) | value
            out[key] = value
        return out


class DataSource(Section):
    type: Literal["jsonl", "parquet", "hf", "reasoning_gym"]
    """Where the rows come from; `hf` is a data set saved on disk by `datasets`, or a hub name."""
    path: str | None = None
    """File or folder (jsonl, parquet, hf)."""
    split: str = "train"
    """Split of an `hf` data set."""
    task: str | None = None
    """reasoning-gym data set name, for example chain_sum."""
    params: dict[str, Any] = {}
    """Passed to the reasoning-gym data set (min_terms, max_digits, ...)."""
    size: Positive = 10_000
    """Rows to generate (reasoning_gym)."""
    seed: int = 0
    """Seed of the generator (reasoning_gym); use another one for held-out data."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source in a mixture, relative to the others."""
    reward: str | None = None
    """Name of the reward for rows that name none themselves."""


class Tokenizer(Section):
    vocab_size: Positive = 512
    """Entries including the special tokens; digits always stand alone."""
    train_on: list[DataSource] = []
    """Texts the byte-level BPE is trained on; empty: bytes only."""


class Generate(Section):
    """A small random checkpoint in Hugging Face format, made from a seed when `model.path` does not exist yet."""

    family: Literal["qwen3_moe", "qwen3"] = "qwen3_moe"
    """Model family."""
    seed: int = 0
    """Seed of the weights."""
    hidden_size: Positive = 128
    """Width of the residual stream."""
    num_layers: Positive = 4
    """Transformer layers."""
    num_heads: Positive = 8
    """Query heads."""
    num_kv_heads: Positive = 2
    """Key/value heads."""
    head_dim: Positive = 32
    """Width of one head."""
    intermediate_size: Positive = 256
    """Width of a dense MLP."""
    num_experts: Positive = 8
    """Experts per MoE layer."""
    top_k: Positive = 2
    """Experts per token."""
    moe_intermediate_size: Positive = 64
    """Width of one expert."""
    context: Positive = 512
    """Longest sequence (max_position_embeddings)."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Output layer shares the embedding's weights."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    tokenizer: Tokenizer = Tokenizer()
    """The tokenizer made with the checkpoint."""


class Model(Section):
    path: str
    """Hugging Face checkpoint folder (config.json, safetensors, tokenizer)."""
    generate: Generate | None = None
    """Make the checkpoint at `path` when it is not there."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Learner and rollout precision; float64 is for comparisons on a learner alone (`megarl verify layouts`)."""
    layers: Literal["auto", "torch", "te"] = "auto"
    """Layer provider: PyTorch, Transformer Engine, or Transformer Engine where it is installed and takes the precision;
    `megarl doctor` says which and why. Checkpoints are the same."""
    router_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the router's matrix product and softmax."""
    head_dtype: Literal["float32"] | None = None
    """Precision of the output layer's product, in the learner and in vLLM; none: `dtype`. For bfloat16 models: their logits
    have 8 bits otherwise."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """FP8 recipe of the layers' matrix products in the learner; embeddings, routers, attention scores and the output layer
    stay in `dtype`. Rounded to FP8 and multiplied in float32 where the chip has no FP8 product of the kind."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: gradients in E5M2; none: hybrid for delayed and tensorwise, e4m3 for the others."""
    fp8_skip_first: NonNegative = 0
    """Layers at the start of the model whose products stay in `dtype`."""
    fp8_skip_last: NonNegative = 0
    """Layers at the end of the model whose products stay in `dtype`."""
    fp8_power_of_two: bool = True
    """Scales of blockwise are powers of two, as those of mxfp8 always are and as Transformer Engine has them (Blackwell's
    blocks need it); false: any float32, as in DeepSeek-V3's weights. Those of rollout.fp8's weights too."""
    fp8_history: Positive = 16
    """Optimizer steps whose largest magnitudes (amax) make the scales of delayed (Transformer Engine: 1024 micro-batches)."""
    fp8_amax: Literal["max", "most_recent"] = "max"
    """Of these steps, the largest amax or the last one."""
    fp8_margin: NonNegative = 0
    """Powers of two that the scales of delayed leave free for what is larger than in the past."""
    fp8_params: bool = False
    """Weights of the layers' products are kept as FP8 codes alone: half the bytes of bfloat16 beside FP8 copies, and gathered
    as one byte each after a step (mxfp8: as two). The float32 main weights stay exact; what leaves the learner (weight sync,
    exports) are the rounded ones. Needs fp8, layers: te, Adam, and parallel.distributed_optimizer."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""


class Parallel(Section):
    nproc: Positive | None = None
    """Ranks to start locally; none: the smallest world the layout allows (torchrun's own world wins)."""
    tp: Positive = 1
    """Tensor parallel degree (sequence parallelism is on whenever it is above 1)."""
    pp: Positive = 1
    """Pipeline parallel degree."""
    vpp: Positive | None = None
    """Virtual pipeline stages per rank."""
    ep: Positive = 1
    """Expert parallel degree."""
    etp: Positive = 1
    """Expert tensor parallel degree."""
    cp: Positive = 1
    """Context parallel degree: every sequence is cut into 2 cp chunks, of which a rank holds an early and a late one."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage; none: as many as the others. Not with virtual stages."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage; none: as many as the others. Not with virtual stages."""
    embedding_in_split: bool = False
    """The embedding counts as a layer when layers are shared out over the stages."""
    loss_in_split: bool = False
    """The output layer and the loss count as a layer when layers are shared out over the stages."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: each to its expert's rank, or all to all ranks (small ep, many experts a token)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of norms and of MLPs or experts, or all of a layer."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks (a float64 model does not)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the two above."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10
    """A collective that takes longer ends the job."""
    max_restarts: NonNegative = 0
    """How often local ranks are started again, from the newest checkpoint, when one has failed (`torchrun --max-restarts`
    otherwise)."""


class Optimizer(Section):
    type: Literal["adam", "sgd", "muon"] = "adam"
    """Adam, plain gradient descent, or Megatron's Muon: for matrices outside experts and embeddings, with Adam for the rest,
    not sharded; needs emerging_optimizers."""
    implementation: Literal["auto", "te", "apex", "fused", "foreach", "for-loop"] = "auto"
    """Whose Adam: Transformer Engine's, NVIDIA Apex's, or PyTorch's in one of its three ways; auto: on CUDA the first that is
    installed of te and apex, otherwise fused."""
    cpu_offload: bool = False
    """Main weights and moments stay on the host for good and are stepped there, by PyTorch's fused Adam."""
    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end of the schedule, as a share of the peak."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Adam's averaging coefficients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay (norms and biases excluded)."""
    decoupled_weight_decay: bool = True
    """Weight decay beside the gradient step (AdamW); false: added to the gradient (L2)."""
    muon_momentum: Fraction = 0.95
    """Muon's momentum."""
    muon_ns_steps: Positive = 5
    """Newton-Schulz iterations of Muon's orthogonalisation."""
    muon_scale: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """How Muon scales an update by the matrix's shape."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class SFT(Section):
    data: list[DataSource]
    """Training rows: chat `messages`, `prompt`/`response`, or `text`."""
    validation: list[DataSource] = []
    """Rows for the validation loss."""
    validate_every: NonNegative = 0
    """Steps between validation losses; 0 = only at the end."""
    steps: Positive = 200
    """Optimizer steps, at most."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the routers' load balancing loss, taken over each micro-batch."""
    stop_at_loss: Annotated[float, Field(gt=0)] | None = None
    """End before `steps` once the mean training loss of the last 10 steps is below this; none: never."""
    batch_size: Positive = 128
    """Sequences per optimizer step, over all ranks."""
    micro_batch_tokens: Positive = 8192
    """Token budget of one packed micro-batch on one rank."""
    max_tokens: Positive | None = None
    """Longer rows are dropped and counted; none: the model's context."""
    optimizer: Optimizer = Optimizer(lr=1e-3, schedule="cosine", warmup_steps=10)
    """Optimizer and schedule."""


class RewardModel(Section):
    data: list[DataSource]
    """Preferences: `chosen` and `rejected` as whole conversations, or as answers to `prompt`."""
    validation: list[DataSource] = []
    """Pairs for the validation loss and accuracy."""
    validate_every: NonNegative = 0
    """Steps between validations; 0 = only at the end."""
    steps: Positive = 200
    """Optimizer steps."""
    batch_size: Positive = 64
    """Pairs per optimizer step, over all ranks."""
    micro_batch_tokens: Positive = 8192
    """Token budget of one packed micro-batch on one rank; both sides of a pair share one."""
    max_tokens: Positive | None = None
    """Pairs with a longer side are dropped and counted; none: the model's context."""
    optimizer: Optimizer = Optimizer(lr=1e-5, schedule="cosine", warmup_steps=10)
    """Optimizer and schedule."""
    init_from: Literal["sft", "model"] = "sft"
    """Start from the SFT result of this project, or from `model.path`; `sft` without an `sft` section means `model`."""


class Choice(Section):
    """A registered function of an axis; every other key is a setting of it, checked against its signature."""

    model_config = ConfigDict(extra="allow")

    type: str = ""
    """Its name; unset: the preset's; `none` removes an axis that an algorithm can do without."""


class KL(Section):
    estimator: str | None = None
    """Schulman's estimators k1, k2, k3; `k3+` has k3's value and k2's gradient; `k3-is` is k3 times the ratio."""
    coef: Annotated[float, Field(ge=0)] | None = None
    """Its weight; 0 removes the term, and no reference model is kept."""
    placement: str | None = None
    """`loss`: a term of the loss; `reward`: subtracted from the reward of each token."""
    input_clamp: Annotated[float, Field(gt=0)] | None = None
    """Largest |log-ratio to the reference| that keeps its gradient."""
    output_clamp: Annotated[float, Field(gt=0)] | None = None
    """Largest |estimate| that keeps its gradient."""


class Correction(Section):
    """For the gap between rollout engine and learner: a weight for the policy term of each token."""

    level: str | None = None
    """token, sequence-product, sequence-mean (geometric), or token-current-over-rollout."""
    mode: str = ""
    """truncate (TIS), clip, mask (MIS, IcePop), filter-then-token-weight (geometric filter), or none."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Lower bound on old / rollout at `level` (clip, mask, filter)."""
    high: Annotated[float, Field(gt=0)] | None = None
    """Upper bound."""
    renormalise: bool | None = None
    """Rejected tokens leave the denominators too."""


class Value(Section):
    """The critic's loss; its optimizer is `rl.critic`."""

    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest move of a value per rollout that keeps its gradient; none: as the preset (0.2)."""


class Algorithm(Section):
    """An algorithm is a value on independent axes: a preset names one, and single axes override it.

    An axis that is not given is the preset's.
    """

    preset: str = "gspo"
    """Where the axes below start from: ppo, grpo, dr_grpo, dapo, gspo, gspo_token, sapo, cispo, gmpo, rloo,
    reinforce_pp, reinforce_pp_baseline or minirl."""
    advantage: Choice | None = None
    """group (scale, eps, ddof, singleton), leave-one-out, group-mean-then-whiten, return-to-go, gae (gamma, lam, whiten)."""
    ratio: str = ""
    """none, token, sequence, sequence-token, sequence-product or geometric-mean-of-clipped."""
    gate: Choice | None = None
    """none, clip (low, high, dual), soft (tau_pos, tau_neg), stop-gradient-weight, log-clip or ratio-mask (low, high)."""
    aggregate: str | None = None
    """token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean or fixed-length, always with global denominators."""
    kl: KL | None = None
    """Penalty towards the reference model."""
    filter: Choice | None = None
    """dynamic-sampling: groups without a signal are replaced by fresh prompts."""
    shaping: Choice | None = None
    """soft-overlong (max_length, cache): a penalty for responses close to the budget."""
    drop_truncated: bool | None = None
    """Responses cut at the budget are not trained on (overlong filtering)."""
    value: Value | None = None
    """The critic's loss, for advantage gae."""
    correction: Correction | None = None
    """For the gap between rollout engine and learner."""
    veto: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop a sequence with a token of old / rollout below this."""
    off_policy_sequence_mask: Annotated[float, Field(gt=0)] | None = None
    """Drop a sequence with a negative advantage that moved away from the old policy by more than this (nats a token)."""
    ratio_base: str | None = None
    """old, or rollout: the ratio is taken to the engine's log-probs and no old pass is made (bypass)."""
    n_seq: str | None = None
    """all: empty sequences count in denominators; valid: they do not."""
    fixed_length: Positive | None = None
    """Tokens that aggregate fixed-length divides by; none: rollout.max_response_tokens."""


class Critic(Section):
    """The value model, when the algorithm has one."""

    init_from: str | None = None
    """Checkpoint it starts from: a language model or a reward model; none: the policy's."""
    optimizer: Optimizer = Optimizer(lr=2e-5)
    """Its own optimizer and schedule; the schedule counts optimizer steps."""
    warmup_steps: NonNegative = 0
    """Rollout steps at the start in which only the critic is trained."""


class RL(Section):
    data: list[DataSource]
    """Prompts: `messages` or `prompt`, `answer`, optional `reward` name."""
    algorithm: Algorithm = Algorithm()
    """The policy-gradient loss."""
    critic: Critic = Critic()
    """The value model of an algorithm that has one."""
    max_sampling_rounds: Positive = 8
    """Rollouts per step, at most, until a filter has kept enough groups; then the step trains on what there is."""
    steps: Positive = 100
    """Rollout steps: sample, score, update, sync."""
    prompts_per_step: Positive = 16
    """Prompts sampled each step, over all ranks."""
    samples_per_prompt: Positive = 8
    """Responses per prompt: the size of a group."""
    optimizer_steps_per_rollout: Positive = 4
    """Optimizer steps each rollout batch is split into."""
    micro_batch_tokens: Positive = 8192
    """Token budget of one packed micro-batch on one rank."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts are dropped and counted; none: what the context leaves beside the response."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and schedule; the schedule counts optimizer steps."""
    init_from: Literal["sft", "model"] = "sft"
    """Start from the SFT result of this project, or from `model.path`; `sft` without an `sft` section means `model`."""
    reference: str | None = None
    """Checkpoint of the reference model; none: the policy the run starts from."""
    routing_replay: Literal["none", "old", "rollout"] = "none"
    """Which experts the passes of an update take: their routers' own choice, those of the old pass (R2), or those that
    the engine sampled with (R3). Reference, critic and reward models always choose for themselves."""
    max_routing_mismatch: Fraction = 0.15
    """Largest share of experts in a layer that engine and learner may choose differently with the same weights; more
    means that the record is misaligned, and ends the run."""
    freeze_router: bool = False
    """The routers keep their weights."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the routers' load balancing loss, from live routing whatever is replayed; RL is usually better without."""


class Rollout(Section):
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision the engine samples in; none: the learner's. Weights are cast as they are synced."""
    fp8: Literal["none", "blockwise"] = "none"
    """blockwise: vLLM's FP8 layers, weights in blocks of 128 x 128, quantised as they are synced, and activations in groups
    of 1 x 128; on a CPU the same numbers, multiplied in float32. What model.fp8 leaves in higher precision stays so here,
    the layers of model.fp8_skip_first and fp8_skip_last too. `megarl eval` reads a checkpoint as it is, without this."""
    max_response_tokens: Positive = 64
    """Longest response."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the learner divides its logits by the same."""
    tensor_parallel: Positive = 1
    """Ranks that share one replica of the model, and its prompts."""
    data_parallel: Positive = 1
    """Replicas that share their experts and decode in lock-step, each its own prompts; needs expert_parallel."""
    expert_parallel: bool = False
    """Whole experts are dealt out over the tensor_parallel x data_parallel ranks; false: every expert's columns are."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.25
    """Key/value cache per engine on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of a CUDA device that vLLM may take."""
    max_concurrent: Positive = 512
    """Sequences the engine decodes at once."""
    max_context: Positive | None = None
    """Longest prompt + response the engine accepts; none: the model's context."""
    sync_threshold: Annotated[float, Field(gt=0)] | None = None
    """Largest mean learner/engine log-prob gap a weight sync may show; none: 1e-5, or 5e-2 where one has bfloat16
    or the engine FP8 (the learner then rounds the probes as the engine does; `sync_check: full` sees every bit)."""
    sync_check: Literal["probe", "full", "none"] = "probe"
    """How a weight sync is checked: probe compares both engines' log-probs of fixed sequences, full also a checksum of every
    tensor (several times the sync itself), none nothing."""
    probe_sequences: Positive = 4
    """Fixed sequences each weight sync is checked with."""
    routed_experts: bool = False
    """Record which experts the engine used for every token."""


class Reward(Section):
    type: str = "exact_match"
    """exact_match, regex, math_verify, reasoning_gym, code, http, `module:function`, model (a reward model's score of prompt
    and response), or weighted (a sum of named rewards)."""
    params: dict[str, Any] = {}
    """Passed to the reward (pattern, url, ...); of model: `path`; of weighted: `weights`, {name of a part: factor}.
    `$NAME` in url and headers of http is read from the environment when it is used, and never saved."""
    named: dict[str, Reward] = {}
    """Rewards that rows can choose by name, and the parts of a weighted one."""
    workers: Positive = 1
    """Scoring processes per rank."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10
    """Hard limit for one response; the worker is killed and replaced."""
    cpu_seconds: Positive = 60
    """Processor time of one response, in each process that scores it."""
    memory_gib: Annotated[float, Field(gt=0)] = 4.0
    """Memory of one worker with all it has started; more ends the worker, and the response has failed."""
    max_processes: Positive = 256
    """Processes and threads of one worker with all it has started; what a response has started ends with it."""
    network: bool = False
    """`module:function` may open connections and sees the environment's tokens. http always may, programs of code never."""
    failed_score: float = 0.0
    """Score of a response whose reward crashed or timed out."""
    max_failed_fraction: Fraction = 0.2
    """The run stops when more than this share of a step's responses could not be scored."""


class Eval(Section):
    data: list[DataSource] = []
    """Held-out problems."""
    every: NonNegative = 0
    """Rollout steps between evaluations; 0 = only before the first and after the last step."""
    samples: Positive = 1
    """Responses per problem; 1 = greedy, k > 1 = sampled, reported as avg@k and pass@k."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature when samples > 1."""
    max_response_tokens: Positive | None = None
    """Longest response; none: the rollout's."""


class Checkpoint(Section):
    every: NonNegative = 50
    """Steps between checkpoints; 0 = only at the end."""
    keep: Positive = 2
    """How many are kept; the newest whole one always is."""
    async_save: bool = False
    """Copy what is saved, at the cost of its memory on the host, and write it while the run goes on; a failure ends the run
    at the next step boundary."""
    stop_after: Positive | None = None
    """Steps after which a start of a run saves and ends, for another start with resume=auto to go on; none: it goes on."""


class Export(Section):
    every: NonNegative = 0
    """Steps between Hugging Face exports; 0 = only at the end."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the exported weights; none: the learner's."""


class Memory(Section):
    """RL's two phases on one device: what leaves it, for the host, while vLLM samples, and how vLLM sleeps while the learner
    works. On a CPU the host is the device: only gradients give memory back, and vLLM keeps its own."""

    optimizer_offload: bool = True
    """Main weights and moments of policy and critic are on the device during the update only."""
    grad_offload: bool | None = None
    """So are gradient buffers; they are freed, not copied. By default so on a device of its own; on a CPU getting the memory
    again costs more than it frees."""
    param_offload: bool = False
    """The learner's weights are on the host while vLLM samples; a weight sync reads them there, a layer at a time."""
    sleep_level: Literal[0, 1, 2] = 2
    """Of vLLM while the learner works: 2 drops weights and key/value cache (a weight sync writes all weights anyway), 1 keeps
    the weights on the host, 0 is awake."""


class Log(Section):
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project; needs the wandb package."""
    rollouts_every: NonNegative = 1
    """Steps between files of sampled trajectories in rollouts/; 0 = none."""
    routing_tokens: NonNegative = 512
    """Tokens per data-parallel rank on which every RL step of an MoE model measures how routing moves; 0 = none."""
    routing_variance: bool = False
    """Also measure on them how much of the spread of the log-ratio is due to changed experts: one more pass a step."""
    profile_steps: list[NonNegative] = []
    """Steps recorded with the PyTorch profiler into profile/."""
    grace_seconds: Annotated[float, Field(ge=0)] = 8
    """How long Ctrl-C waits for the end of the step."""
    warned_grace_seconds: Annotated[float, Field(ge=0)] = 25
    """How long SIGTERM or SIGUSR1 waits for it: the warning of a scheduler, which kills after some time of its own."""


PHASES = (
    "start", "between_phases", "data", "generate", "reward", "gather", "prepare", "routing", "old_log_probs", "offload",
    "update", "sync", "eval", "validation", "checkpoint", "export",
)  # fmt: skip


class Watchdog(Section):
    """Ends a job that hangs: every rank's stack goes into its log, and one line says where each of them was."""

    seconds: Annotated[float, Field(ge=0)] = 3600
    """How long a rank may be in one phase of a step, or between two; 0: as long as it takes."""
    phases: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Limits of single phases, by the names of the `time/` metrics, `start` or `between_phases`: {generate: 7200}."""


class Alarm(Section):
    above: Annotated[float, Field(gt=0)] | None = None
    """The largest figure that is no alarm; none: there is no such alarm."""
    action: Literal["warn", "skip", "stop"] = "warn"
    """warn: a line; skip: leave the weights as they are and go on; stop: end the run, also with nothing changed where the
    figure is known before the update."""


class Alarms(Section):
    """Figures that say that something goes wrong, decided alike on all ranks; each one raised is 1 in `alarms/<name>`."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: end the run, or leave this optimizer step out. Its micro-batches are kept in
    failed/ for `megarl replay`."""
    max_skips: NonNegative = 10
    """Optimizer steps that may be left out, in 100 steps of the run; one more ends it."""
    window: Annotated[int, Field(ge=2)] = 20
    """Past steps whose median a figure is compared with; until there are so many, nothing is."""
    grad_norm: Alarm = Alarm(above=30)
    """Gradient norm of an optimizer step, over the median."""
    loss: Alarm = Alarm(above=5)
    """Loss of SFT, reward model or critic, over the median (a policy's loss is around 0, and says nothing)."""
    length: Alarm = Alarm(above=4)
    """Mean length of the responses of a step, over the median."""
    gap: Alarm = Alarm(above=0.2)
    """Mean |learner - engine| log-prob of the sampled tokens, in nats."""
    kl: Alarm = Alarm(above=2)
    """KL to the reference model, in nats a token. warn or stop: it is known after the update."""
    entropy_loss: Alarm = Alarm(above=0.98)
    """Share that the entropy has lost since the first `window` steps. warn or stop."""
    held_out_loss: Alarm = Alarm(above=0.1)
    """Accuracy lost between two evaluations while the mean reward of the steps rose: a sign of reward hacking. warn or
    stop."""


class Study(Section):
    """`megarl study drift`: every method with every kind of routing replay, over several seeds."""

    methods: dict[str, Algorithm] = {
        "grpo": Algorithm(preset="grpo"),
        "gspo": Algorithm(preset="gspo"),
        "sapo": Algorithm(preset="sapo"),
    }
    """Algorithms by the names they have in the results."""
    routing_replay: list[Literal["none", "old", "rollout"]] = ["none", "old", "rollout"]
    """What `rl.routing_replay` is set to."""
    seeds: Positive = 5
    """Runs of each arm, with `seed`, `seed` + 1, ...; all arms of a seed share their start and the order of the data."""
    results: str | None = None
    """Folder of RESULTS.md and study.html; none: the run_dir."""


class Config(Section):
    """One YAML holds a whole project."""

    seed: int = 1
    """Everything random in the run derives from it."""
    run_dir: str = "runs/default"
    """Where everything the project writes goes: sft/, reward_model/, rl/, report.html."""
    resume: Literal["auto", "never"] = "never"
    """`auto`: continue from the newest checkpoint when there is one; `never`: refuse an existing run folder."""
    model: Model
    """The model to train."""
    parallel: Parallel = Parallel()
    """Degrees of parallelism."""
    sft: SFT | None = None
    """Supervised warm start (`megarl sft`)."""
    reward_model: RewardModel | None = None
    """A reward model from preferences (`megarl reward-model`)."""
    rl: RL | None = None
    """Reinforcement learning (`megarl train`)."""
    rollout: Rollout = Rollout()
    """Sampling."""
    reward: Reward = Reward()
    """How responses are scored."""
    eval: Eval = Eval()
    """Held-out accuracy."""
    checkpoint: Checkpoint = Checkpoint()
    """Distributed checkpoints."""
    export: Export = Export()
    """Hugging Face exports."""
    memory: Memory = Memory()
    """What is on the device in which phase of RL."""
    log: Log = Log()
    """What is written beside the console."""
    watchdog: Watchdog = Watchdog()
    """The end of a run that hangs."""
    alarms: Alarms = Alarms()
    """Numbers gone wrong."""
    study: Study | None = None
    """Comparisons over several runs (`megarl study`); none: as they are by default."""

    @property
    def rollout_dtype(self) -> str:
        """The engine's precision."""
        return self.rollout.dtype or self.model.dtype
