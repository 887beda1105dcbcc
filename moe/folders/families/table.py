"""All families, and which of them a model is exported as."""

from ...config.model import LayersConfig
from ..expert_layouts import SeparateExperts
from .bert import BERT
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .dense import LLAMA, QWEN3
from .family import Family
from .gpt_oss import GPT_OSS
from .mixtral import MIXTRAL
from .native import NATIVE
from .olmoe import OLMOE
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .smallthinker import SMALLTHINKER
from .t5 import SWITCH_TRANSFORMERS, T5

FAMILIES = {
    family.model_type: family
    for family in (
        QWEN3_MOE,
        QWEN3,
        MIXTRAL,
        QWEN2_MOE,
        OLMOE,
        DEEPSEEK_V3,
        DEEPSEEK_V2,
        GPT_OSS,
        LLAMA,
        SMALLTHINKER,
        BERT,
        T5,
        SWITCH_TRANSFORMERS,
        NATIVE,
    )
}
"""By ``model_type``."""


def family_for(
    config: LayersConfig, preferred: str | None = None, has_separate_experts: bool = False
) -> Family:
    """Return the family to export ``config`` as: the first that can express all of it.

    ``preferred``, the ``model_type`` a model came from, is first; then those that transformers
    opens; then our own, which can express everything. ``has_separate_experts`` leaves out those
    that keep many experts in one tensor.
    """
    candidates = [family for family in FAMILIES.values() if family.is_in_transformers]
    if preferred is not None and preferred != NATIVE.model_type:
        candidates.insert(0, FAMILIES[preferred])
    for family in candidates:
        is_separate = isinstance(family.experts, SeparateExperts)
        if family.why_not(config) is None and (is_separate or not has_separate_experts):
            return family
    return NATIVE


def why_native(config: LayersConfig) -> str:
    """Return one sentence on why transformers has no class for ``config``.

    It is about the nearest family: the one that differs in the fewest fields.
    """
    families = [family for family in FAMILIES.values() if family.is_in_transformers]
    if any(family.why_not(config) is None for family in families):
        return "Experts are stored one by one; families that can express the model have one tensor."
    other = {family.model_type: family.differences(config) for family in families}
    near = [name for name, differences in other.items() if differences]
    alike = [family.model_type for family in families if config.kind in family.kinds]
    if not alike:
        return f"Models of kind {config.kind} have no class in transformers."
    nearest = min(near, key=lambda name: len(other[name]), default=alike[0])
    return f"{FAMILIES[nearest].why_not(config)}, and no other family of transformers expresses it."
