"""What a reward configuration means: which rewards it names, whether they can exist, what each needs of a row."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

from megarl.errors import BadInput
from megarl.rewards.functions import BUILT_IN
from megarl.rewards.judge import HttpJudge

if TYPE_CHECKING:
    from megarl.config.schema import Reward

NEEDS = {"exact_match": "answer", "regex": "answer", "math_verify": "answer", "reasoning_gym": "entry", "code": "tests"}
MODEL, WEIGHTED = "model", "weighted"  # scored by the learner, and a sum of others: no function of one text
OWN_METRICS = ("mean", "score", "failed_fraction", "unscored")  # reward/<name> of these is taken


def all_rewards(reward: Reward) -> dict[str | None, Reward]:
    """Every reward rows can get: the config's own under None, then the named ones."""
    return {None: reward, **reward.named}


def verifiers(reward: Reward) -> dict[str | None, Reward]:
    """Those of `all_rewards` that are functions of a prompt, a response and an answer, run by worker processes."""
    return {name: one for name, one in all_rewards(reward).items() if one.type not in (MODEL, WEIGHTED)}


def parts(reward: Reward, name: str | None) -> dict[str | None, float]:
    """What a row that names `name` is scored with: reward names and their factors. Raises BadInput for an unknown name.

    Example: `{"correct": 1.0, "quality": 0.1}` of a weighted reward, `{name: 1.0}` of any other.
    """
    rewards = all_rewards(reward)
    if name not in rewards:
        known = ", ".join(sorted(reward.named)) or "none are defined"
        raise BadInput(f"reward {name!r} is not in reward.named ({known}); name one of these or define it")
    one = rewards[name]
    if one.type != WEIGHTED:
        return {name: 1.0}
    return {part: float(factor) for part, factor in one.params["weights"].items()}


def check_reward(reward: Reward) -> None:
    """Raises BadInput for an unknown type, for params it does not take, and for names inside a named reward.

    Cheap: imports no verifier. What only construction shows (a bad pattern, a missing module) comes from
    `RewardRunner`.
    """
    for name, one in all_rewards(reward).items():
        key = "reward" if name is None else f"reward.named.{name}"
        if name is not None and one.named:
            raise BadInput(f"{key}.named: {sorted(one.named)}; move these names to reward.named")
        if one.type == WEIGHTED:
            _check_weighted(key, name, one, reward)
            continue
        if one.type == MODEL:
            if set(one.params) != {"path"} or not isinstance(one.params["path"], str):
                raise BadInput(f"{key}.params: {one.params} does not fit model; set path: FOLDER of a reward model")
            continue
        if ":" in one.type:
            module, _, function = one.type.partition(":")
            if not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
                raise BadInput(f"{key}.type: {one.type!r}; set module:function, for example my_rewards:score")
            continue
        if one.type not in BUILT_IN:
            known = ", ".join((*BUILT_IN, MODEL, WEIGHTED))
            raise BadInput(f"{key}.type: {one.type!r}; set one of {known} or module:function")
        try:
            inspect.signature(HttpJudge if one.type == "http" else BUILT_IN[one.type]).bind(**one.params)
        except TypeError as error:
            raise BadInput(f"{key}.params: {one.params} does not fit {one.type}: {error}") from None


def _check_weighted(key: str, name: str | None, one: Reward, reward: Reward) -> None:
    if name is not None:
        raise BadInput(f"{key}.type: 'weighted'; only reward.type itself can be weighted")
    weights = one.params.get("weights")
    if set(one.params) != {"weights"} or not isinstance(weights, dict) or not weights:
        raise BadInput(f"{key}.params: {one.params} does not fit weighted; set weights: {{NAME: FACTOR, ...}}")
    for part, factor in weights.items():
        if part not in reward.named:
            known = ", ".join(sorted(reward.named)) or "none are defined"
            raise BadInput(f"{key}.params.weights: {part!r} is not in reward.named ({known}); define it there")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise BadInput(f"{key}.params.weights.{part}: {factor!r}; set a number")
        if part in OWN_METRICS:
            raise BadInput(f"reward.named.{part}: reward/{part} is a metric of its own; give the part another name")


def required_field(reward: Reward, name: str | None = None) -> tuple[str, ...]:
    """The fields a row must have for the reward it names: some of "answer", "entry" (a reasoning-gym entry) and "tests".

    Raises BadInput when no reward has that name.
    """
    rewards = all_rewards(reward)
    needed = (NEEDS.get(rewards[part].type) for part in parts(reward, name))
    return tuple(dict.fromkeys(field for field in needed if field))
