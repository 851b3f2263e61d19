"""The model families megarl converts: one table each."""

from __future__ import annotations

from megarl.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megarl.convert.families.glm4_moe import GLM4_MOE
from megarl.convert.families.gpt_oss import GPT_OSS
from megarl.convert.families.llama import LLAMA
from megarl.convert.families.mixtral import MIXTRAL
from megarl.convert.families.olmoe import OLMOE
from megarl.convert.families.qwen2 import QWEN2, QWEN2_MOE
from megarl.convert.families.qwen3 import QWEN3
from megarl.convert.families.qwen3_moe import QWEN3_MOE
from megarl.convert.family import Family
from megarl.errors import BadInput

TABLES = (
    QWEN3_MOE, QWEN3, QWEN2_MOE, QWEN2, MIXTRAL, OLMOE, LLAMA, DEEPSEEK_V3, DEEPSEEK_V2, GLM4_MOE, GPT_OSS,
)  # fmt: skip
FAMILIES: dict[str, Family] = {table.model_type: table for table in TABLES}


def family(model_type: str, where: str = "config.json") -> Family:
    """The table of a `model_type`. Raises BadInput, naming the supported ones."""
    if model_type not in FAMILIES:
        raise BadInput(f"{where}: model_type={model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
