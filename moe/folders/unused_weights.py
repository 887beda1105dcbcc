"""Weights that a folder has and its ``config.json`` does not ask for.

Some folders have known weights outside the language model: layers that predict further tokens,
towers for pictures and sound, tables that we compute anyway. Those are left out, and one line says
so. All others are refused: if ``config.json`` forgot a bias or a shared expert,
every number would be wrong without any warning.
"""

import re
from collections import Counter
from collections.abc import Iterable

from ...errors import ModelFileError

FURTHER_TOKENS = "layers that predict further tokens"
NOT_OURS = {
    r"(model\.)?mtp\b|mtp_": FURTHER_TOKENS,  # Qwen3-Next, ERNIE, LongCat, Nemotron-H
    r"(model\.)?(visual|vision_tower|vision_model|vision_encoder|image_newline)\b": "pictures",
    r"(model\.)?(multi_modal_projector|mm_projector|vision_projection)\b": "pictures",
    r"(model\.)?(audio_tower|audio_encoder|talker|code2wav|token2wav)\b": "sound",
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$": "rotary tables",
    r"(.*\.)?position_ids$": "positions",
    r"cls\.": "another task's head",  # BERT's pre-training
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.": "positions",  # T5
}
"""Patterns from a name's first character, as in ``_keys_to_ignore_on_load_unexpected`` of
transformers' models, and what such weights are for."""

REMEDY = (
    "correct config.json, or pass ignore_unused_weights=True (--ignore-unused-weights) to leave "
    "them out"
)


def extra_layer(name: str) -> int | None:
    """Return the decoder layer that a weight belongs to, or None."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def check_unused(
    folder: str, unused: Iterable[str], layers_behind: range, is_fine: bool
) -> str | None:
    """Return a line about the weights that are left out, or None where there are none.

    Raises :class:`ModelFileError` if a weight of ``unused`` is not a known extra.

    ``layers_behind`` are the layers after the model's that predict further tokens (DeepSeek-V3).
    With ``is_fine`` nothing is refused, and the line counts all.
    """
    kinds: Counter[str] = Counter()
    unknown = []
    for name in unused:
        kind = _kind(name, layers_behind)
        if kind is None:
            unknown.append(name)
        else:
            kinds[kind] += 1
    if unknown and not is_fine:
        raise ModelFileError(
            f"{folder} has {len(unknown)} weight(s) that its config.json does not ask for "
            f"({_some(unknown)}), and the model would not use them; {REMEDY}."
        )
    if unknown:
        kinds[f"what config.json does not ask for, {_some(unknown)}"] = len(unknown)
    if not kinds:
        return None
    found = ", ".join(f"{kind} ({count} weights)" for kind, count in kinds.items())
    return f"{folder} has weights that are left out: {found}."


def _kind(name: str, layers_behind: range) -> str | None:
    if extra_layer(name) in layers_behind:
        return FURTHER_TOKENS
    return next((kind for pattern, kind in NOT_OURS.items() if re.match(pattern, name)), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
