"""What a reward configuration means: which rewards it names, whether they can exist, what each needs of a row."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from megarl.errors import BadInput
from megarl.rewards.functions import BUILT_IN
from megarl.rewards.judge import HttpJudge

if TYPE_CHECKING:
    from megarl.config.schema import Reward

NEEDS = {"exact_match": "answer", "regex": "answer", "math_verify": "answer", "reasoning_gym": "entry"}


def all_rewards(reward: Reward) -> dict[str | None, Reward]:
    """Every reward rows can get: the config's own under None, then the named ones."""
    return {None: reward, **reward.named}


def check_reward(reward: Reward) -> None:
    """Raises BadInput for an unknown type, for params it does not take, and for names inside a named reward.

    Cheap: imports no verifier. What only construction shows (a bad pattern, a missing module) comes from
    `RewardRunner`.
    """
    for name, one in all_rewards(reward).items():
        key = "reward" if name is None else f"reward.named.{name}"
        if name is not None and one.named:
            raise BadInput(f"{key}.named: {sorted(one.named)}; move these names to reward.named")
        if ":" in one.type:
            module, _, function = one.type.partition(":")
            if not all(part.isidentifier() for part in module.split(".")) or not function.isidentifier():
                raise BadInput(f"{key}.type: {one.type!r}; set module:function, for example my_rewards:score")
            continue
        if one.type not in BUILT_IN:
            raise BadInput(f"{key}.type: {one.type!r}; set one of {', '.join(BUILT_IN)} or module:function")
        try:
            inspect.signature(HttpJudge if one.type == "http" else BUILT_IN[one.type]).bind(**one.params)
        except TypeError as error:
            raise BadInput(f"{key}.params: {one.params} does not fit {one.type}: {error}") from None


def required_field(reward: Reward, name: str | None = None) -> str | None:
    """The field a row must have for the reward it names: "answer", "entry" (a reasoning-gym entry) or None.

    Raises BadInput when no reward has that name.
    """
    rewards = all_rewards(reward)
    if name not in rewards:
        known = ", ".join(sorted(reward.named)) or "none are defined"
        raise BadInput(f"reward {name!r} is not in reward.named ({known}); name one of these or define it")
    return NEEDS.get(rewards[name].type)
