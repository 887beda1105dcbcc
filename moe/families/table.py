"""All families, and which of them a model is exported as."""

from ..config import ModelConfig
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .dense import LLAMA, QWEN3
from .family import Family
from .gpt_oss import GPT_OSS
from .mixtral import MIXTRAL
from .native import NATIVE
from .olmoe import OLMOE
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .smallthinker import SMALLTHINKER

FAMILIES = {
    family.model_type: family
    for family in (
        *(QWEN3_MOE, QWEN3, MIXTRAL, QWEN2_MOE, OLMOE, DEEPSEEK_V3, DEEPSEEK_V2, GPT_OSS, LLAMA),
        *(SMALLTHINKER, NATIVE),
    )
}
"""By ``model_type``."""


def family_for(config: ModelConfig, preferred: str | None = None) -> Family:
    """Return the family to export ``config`` as: one that can say all of it.

    ``preferred``, the ``model_type`` a model came from, goes first; then those that transformers
    opens; our own says everything.
    """
    candidates = [family for family in FAMILIES.values() if family.is_in_transformers]
    if preferred is not None and preferred != NATIVE.model_type:
        candidates.insert(0, FAMILIES[preferred])
    for family in candidates:
        if family.why_not(config) is None:
            return family
    return NATIVE


def why_native(config: ModelConfig) -> str:
    """Return one sentence on why transformers has no class for ``config``."""
    reason = (QWEN3_MOE if config.moe is not None else QWEN3).why_not(config)
    return f"{reason}, and no other family of transformers says it."
