"""Everything about a configuration that involves more than one field, checked before a process starts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megarl.config import families
from megarl.config.layouts import Shape, check_layout
from megarl.config.optimizers import check_optimizers, optimizers
from megarl.config.schema import PHASES, Config, DataSource
from megarl.errors import BadInput
from megarl.secrets import refuse_literals

Command = Literal["sft", "reward_model", "rl", "eval", "sync", "routing", "model"]

REWARD_TYPES = ("exact_match", "regex", "math_verify", "reasoning_gym", "code", "http", "model", "weighted")
FP8_BLOCK = 128
NO_VERDICT = ("model", "weighted")  # a number, but not whether an answer is right


def check_config(config: Config, require: Command | None = None) -> None:
    """Raise `BadInput` for the first thing that cannot work; `require` adds what that command reads."""
    _check_software(config, require)
    _check_watch(config)
    _check_sections(config, require)
    check_optimizers(config)
    _check_fp8_params(config)
    _check_sources(config, must_exist=require)
    _check_rewards(config, require)
    shapes = _shapes(config, require)
    if shapes:
        _check_shape(config, shapes[0].config, require)
        _check_fp8_rollout(config, shapes[0].config)
        _check_lengths(config, shapes[0].config["max_position_embeddings"])
    check_layout(config, shapes, config.parallel.nproc)


def _check_watch(config: Config) -> None:
    for name in config.watchdog.phases:
        if name not in PHASES:
            raise BadInput(f"watchdog.phases.{name}: no such phase; set one of {', '.join(PHASES)}")
    for name in ("kl", "entropy_loss", "held_out_loss"):
        if getattr(config.alarms, name).action == "skip":
            raise BadInput(f"alarms.{name}.action = skip: it is known after the update; set warn or stop")


def check_world(config: Config, world_size: int, require: Command | None = None) -> None:
    """Raise `BadInput` unless the layout and the batches divide over `world_size` ranks."""
    check_layout(config, _shapes(config, require), world_size)


def _shapes(config: Config, require: Command | None) -> list[Shape]:
    """The policy, where its shape is known, and the reward models that RL scores with."""
    policy = model_shape(config, require)
    if policy is None:
        return []
    rewards = [config.reward, *config.reward.named.values()] if require == "rl" else []
    judges = [
        _read_config_json(Path(reward.params["path"]) / "config.json") for reward in rewards if reward.type == "model"
    ]
    return [Shape(policy), *(Shape(judge, "the reward model's") for judge in judges)]


def model_shape(config: Config, require: Command | None = None) -> Mapping[str, Any] | None:
    """The keys of config.json that the layout depends on, from `model.path` or `model.generate`.

    None when there is neither and no command requires a model. Raises `BadInput` when config.json cannot be used.
    """
    path = Path(config.model.path)
    g = config.model.generate
    wanted = None
    if g is not None:
        wanted = {
            "model_type": g.family,
            "hidden_size": g.hidden_size,
            "num_hidden_layers": g.num_layers,
            "num_attention_heads": g.num_heads,
            "num_key_value_heads": g.num_kv_heads,
            "head_dim": g.head_dim,
            "intermediate_size": g.intermediate_size,
            "max_position_embeddings": g.context,
        }
        if families.is_moe(wanted):
            wanted |= {
                "num_experts": g.num_experts,
                "num_experts_per_tok": g.top_k,
                "moe_intermediate_size": g.moe_intermediate_size,
            }
    if not (path / "config.json").exists():
        if wanted is None and require is not None:
            raise BadInput(
                f"model.path = {config.model.path!r}: no config.json there; "
                "give a Hugging Face checkpoint folder or a model.generate section"
            )
        return wanted
    found = _read_config_json(path / "config.json")
    for key, value in (wanted or {}).items():
        if found.get(key, value) != value:
            raise BadInput(
                f"{path}/config.json: {key} = {found[key]}, but model.generate asks for {value}; "
                "set another model.path, or remove model.generate to use the checkpoint as it is"
            )
    return found


def _read_config_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{file}: not readable as JSON ({str(e).splitlines()[0]}); restore the checkpoint") from None
    family = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(family, str) or family not in families.FAMILIES:
        raise BadInput(f"{file}: model_type = {family!r} is not supported; use one of {', '.join(families.FAMILIES)}")
    found = families.normalised(found)
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    needed += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] if families.is_moe(found) else []
    for key in needed:
        if not isinstance(found.get(key), int) or found[key] <= 0:
            raise BadInput(f"{file}: {key} = {found.get(key)!r}; restore the file, it must be a positive integer")
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _check_software(config: Config, require: Command | None) -> None:
    if config.model.dtype == "float64" and require in ("rl", "eval", "sync", "routing"):
        raise BadInput("model.dtype = 'float64': vLLM has no float64 kernels; set float32 or bfloat16")
    if config.model.dtype == "float64" and config.model.head_dtype is not None:
        raise BadInput(
            f"model.head_dtype = {config.model.head_dtype!r}: below model.dtype = 'float64'; set model.head_dtype: none"
        )
    if config.model.layers == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise BadInput("model.layers = 'te': Transformer Engine is not installed; set model.layers: torch (or auto)")
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            f"log.wandb = {config.log.wandb!r}: wandb is not installed; pip install wandb, or set log.wandb: none"
        )


def _check_fp8_params(config: Config) -> None:
    """What megatron-core 0.16.1 and Transformer Engine keep weights in FP8 with."""
    model, parallel = config.model, config.parallel
    if not model.fp8_params:
        return
    torch_layers = "PyTorch's layers keep no weights in FP8, they round the same weights to the same numbers at every product"
    reason = None
    if model.fp8 == "none":
        reason = "model.fp8 = 'none'; set model.fp8: blockwise"
    elif model.layers == "torch":
        reason = f"model.layers = 'torch': {torch_layers}; set model.layers: te"
    elif importlib.util.find_spec("transformer_engine") is None:
        reason = f"Transformer Engine is not installed, and {torch_layers}; install it"
    elif model.dtype != "bfloat16":
        reason = f"model.dtype = {model.dtype!r}: Transformer Engine's FP8 layers take bfloat16; set model.dtype: bfloat16"
    elif model.fp8 == "delayed":
        reason = "model.fp8 = 'delayed': its scales start at 1, by which small weights are 0; set model.fp8: tensorwise"
    elif not parallel.distributed_optimizer:
        reason = "it is a part of Megatron's distributed optimizer; set parallel.distributed_optimizer: true"
    elif model.fp8 == "mxfp8" and parallel.overlap_param_gather:
        reason = (
            "weights in mxfp8 are gathered in the memory of the gradients, before the next pass; set "
            "parallel.overlap_param_gather: false"
        )
    for key, optimizer in optimizers(config) if reason is None else ():
        if optimizer.type != "adam":
            reason = f"{key}.type = {optimizer.type!r}: only Adam has Megatron's distributed optimizer; set {key}.type: adam"
        elif optimizer.cpu_offload:
            reason = f"{key}.cpu_offload = true: it steps copies of plain weights; set {key}.cpu_offload: false"
    if reason is not None:
        raise BadInput(f"model.fp8_params = true: {reason}, or model.fp8_params: false")


def _check_sections(config: Config, require: Command | None) -> None:
    if require == "sft" and config.sft is None:
        raise BadInput("sft: missing; add an sft section with data (megarl config lists its fields)")
    if require == "reward_model" and config.reward_model is None:
        raise BadInput("reward_model: missing; add a reward_model section with data (megarl config lists its fields)")
    if require == "rl" and config.rl is None:
        raise BadInput("rl: missing; add an rl section with data (megarl config lists its fields)")
    if require == "eval" and not config.eval.data:
        raise BadInput("eval.data = []: nothing to evaluate on; add a held-out data source")
    for name in ("sft", "reward_model", "rl"):
        section = getattr(config, name)
        if section is not None and not section.data:
            raise BadInput(f"{name}.data = []: nothing to train on; add a data source")
    if config.eval.every and not config.eval.data:
        raise BadInput(
            f"eval.every = {config.eval.every}: there is no eval.data; add a data source or set eval.every: 0"
        )
    for name in ("sft", "reward_model"):
        section = getattr(config, name)
        if section is not None and section.validate_every and not section.validation:
            raise BadInput(
                f"{name}.validate_every = {section.validate_every}: there is no {name}.validation; "
                "add rows or set it to 0"
            )
    if config.rl is not None:
        rl = config.rl
        total = rl.prompts_per_step * rl.samples_per_prompt
        if total % rl.optimizer_steps_per_rollout:
            divisors = [d for d in range(1, rl.optimizer_steps_per_rollout) if total % d == 0]
            raise BadInput(
                f"rl.optimizer_steps_per_rollout = {rl.optimizer_steps_per_rollout}: does not divide the {total} "
                "sequences "
                f"of a rollout ({rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples); set {divisors[-1]}"
            )


def _sources(config: Config) -> Iterator[tuple[str, Command, DataSource]]:
    if config.sft is not None:
        yield from (("sft.data", "sft", s) for s in config.sft.data)
        yield from (("sft.validation", "sft", s) for s in config.sft.validation)
    if config.reward_model is not None:
        yield from (("reward_model.data", "reward_model", s) for s in config.reward_model.data)
        yield from (("reward_model.validation", "reward_model", s) for s in config.reward_model.validation)
    if config.rl is not None:
        yield from (("rl.data", "rl", s) for s in config.rl.data)
    yield from (("eval.data", "eval", s) for s in config.eval.data)


def _check_sources(config: Config, must_exist: Command | None) -> None:
    for key, command, source in _sources(config):
        if source.type == "reasoning_gym":
            if source.task is None:
                raise BadInput(f"{key}: reasoning_gym without a task; set task, for example chain_sum")
        elif source.path is None:
            raise BadInput(f"{key}: {source.type} without a path; set path to a file or folder")
        elif command == must_exist and source.type != "hf" and not Path(source.path).exists():
            raise BadInput(f"{key}: path = {source.path!r}: no such file; set path to a {source.type} file or folder")
        if source.reward is not None and source.reward not in config.reward.named:
            named = ", ".join(config.reward.named) or "none yet"
            raise BadInput(f"{key}: reward = {source.reward!r} is not in reward.named; name one of them ({named})")
    for source in config.eval.data:
        reward = config.reward if source.reward is None else config.reward.named[source.reward]
        if reward.type in NO_VERDICT:
            fits = [name for name, one in config.reward.named.items() if one.type not in NO_VERDICT]
            raise BadInput(
                f"eval.data: reward = {source.reward or 'none'} is of type {reward.type!r}, which does not say whether "
                f"an answer is right; set reward to one of reward.named that does ({', '.join(fits) or 'none yet'})"
            )


def _check_rewards(config: Config, require: Command | None) -> None:
    for key, reward in (("reward", config.reward), *((f"reward.named.{k}", r) for k, r in config.reward.named.items())):
        if reward.type not in REWARD_TYPES and ":" not in reward.type:
            raise BadInput(f"{key}.type = {reward.type!r}: set one of {', '.join(REWARD_TYPES)}, or module:function")
        if reward.type == "http":
            refuse_literals(reward.params, f"{key}.params")
        if reward is not config.reward and reward.named:
            raise BadInput(f"{key}.named: named rewards cannot nest; move its entries to reward.named")
        if reward.type == "model" and require == "rl":
            _check_reward_model(config, f"{key}.params.path", reward.params.get("path"))


def _check_reward_model(config: Config, key: str, path: Any) -> None:
    """The folder is there when RL needs it, is a reward model's, and fits the layout."""
    if not isinstance(path, str) or not (Path(path) / "config.json").exists():
        raise BadInput(
            f"{key} = {path!r}: no config.json there; set the folder of a reward model "
            f"(megarl reward-model writes {config.run_dir}/reward_model/hf)"
        )
    shape = _read_config_json(Path(path) / "config.json")
    architectures = shape.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise BadInput(
            f"{key} = {path!r}: architectures = {architectures} is not a reward model; "
            "set a folder with ...ForSequenceClassification"
        )


def _check_shape(config: Config, shape: Mapping[str, Any], require: Command | None) -> None:
    """The model can be what its config.json says, whatever the layout."""
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    if heads % kv_heads:
        raise BadInput(
            f"model: {heads} query heads are not a multiple of {kv_heads} key/value heads; set num_kv_heads so"
        )
    if config.model.generate is not None and config.model.generate.head_dim % 2:
        raise BadInput(
            f"model.generate.head_dim = {config.model.generate.head_dim}: rotary embedding needs an even width"
        )
    if families.is_moe(shape):
        if shape["num_experts_per_tok"] > shape["num_experts"]:
            raise BadInput(
                f"model: {shape['num_experts_per_tok']} experts per token of {shape['num_experts']}; lower top_k"
            )
    elif require == "routing":
        raise BadInput(
            f"model.path = {config.model.path!r}: a dense model routes nothing; verify routing needs a mixture of experts"
        )
    elif config.rollout.routed_experts:
        raise BadInput("rollout.routed_experts = true: a dense model has no experts; set it to false")
    elif config.rl is not None and config.rl.routing_replay != "none":
        raise BadInput(
            f"rl.routing_replay = {config.rl.routing_replay!r}: a dense model has no experts; set rl.routing_replay: none"
        )


def _check_fp8_rollout(config: Config, shape: Mapping[str, Any]) -> None:
    """Weights are whole blocks, whatever the layout."""
    if config.rollout.fp8 == "none":
        return
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
    sizes = {
        "hidden_size": shape["hidden_size"],
        "num_attention_heads x head_dim": heads * head_dim,
        "num_key_value_heads x head_dim": kv_heads * head_dim,
    }
    sizes |= {"moe_intermediate_size": shape["moe_intermediate_size"]} if families.is_moe(shape) else {}
    for what, size in sizes.items():
        if size % FP8_BLOCK:
            raise BadInput(
                f"rollout.fp8 = {config.rollout.fp8!r}: {what} = {size} is no multiple of {FP8_BLOCK}, the width of a block; "
                "set rollout.fp8: none"
            )


def _check_lengths(config: Config, model_context: int) -> None:
    rollout = config.rollout
    if rollout.max_context is not None and rollout.max_context > model_context:
        raise BadInput(
            f"rollout.max_context = {rollout.max_context}: the model's context is {model_context}; set at most that"
        )
    context = rollout.max_context or model_context
    responses = [("rollout.max_response_tokens", rollout.max_response_tokens)] if config.rl is not None else []
    if config.eval.data:
        own = config.eval.max_response_tokens
        responses += (
            [("eval.max_response_tokens", own)]
            if own
            else [("rollout.max_response_tokens", rollout.max_response_tokens)]
        )
    for key, tokens in responses:
        if tokens >= context:
            raise BadInput(f"{key} = {tokens}: leaves no prompt in a context of {context}; set at most {context // 2}")
    if config.rl is not None:
        rl = config.rl
        longest = (rl.max_prompt_tokens or 1) + rollout.max_response_tokens
        if longest > context:
            raise BadInput(
                f"rl.max_prompt_tokens = {rl.max_prompt_tokens}: with {rollout.max_response_tokens} response tokens it "
                f"exceeds the context of {context}; set at most {context - rollout.max_response_tokens}"
            )
        if longest > rl.micro_batch_tokens:
            raise BadInput(
                f"rl.micro_batch_tokens = {rl.micro_batch_tokens}: one sequence has up to {longest}; "
                f"set at least {longest}"
            )
    for name, sides in (("sft", 1), ("reward_model", 2)):
        section = getattr(config, name)
        if section is None or section.max_tokens is None:
            continue
        if section.max_tokens > model_context:
            raise BadInput(
                f"{name}.max_tokens = {section.max_tokens}: the model's context is {model_context}; set at most that"
            )
        if sides * section.max_tokens > section.micro_batch_tokens:
            raise BadInput(
                f"{name}.micro_batch_tokens = {section.micro_batch_tokens}: one {'row' if sides == 1 else 'pair'} has "
                f"up to {sides * section.max_tokens}; set at least that"
            )
