"""What a model may be given to read, and one sentence for everything else.

B rows, T tokens per row.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ..config.model import ModelConfig


def check_ids(ids_BT: Tensor, config: ModelConfig, max_new_tokens: int = 0) -> None:
    """Raise :class:`ConfigError` unless the model can read ``[B, T]`` ids and go on from there."""
    if not isinstance(ids_BT, Tensor):
        raise ConfigError(f"ids are {brief(ids_BT)}; give a tensor of token ids [B, T].")
    if ids_BT.is_floating_point() or ids_BT.is_complex():
        raise ConfigError(f"ids have type {ids_BT.dtype}; give whole numbers, such as torch.int64.")
    if ids_BT.ndim != 2 or ids_BT.numel() == 0:
        raise ConfigError(f"ids have shape {list(ids_BT.shape)}; give [B, T], both above 0.")
    length = ids_BT.shape[-1] + max_new_tokens
    if length > config.max_positions:
        raise ConfigError(
            f"the sequence would have {length} tokens, but the model takes "
            f"{config.max_positions}; shorten it."
        )
    lowest, highest = (int(bound) for bound in ids_BT.aminmax())
    if lowest < 0 or highest >= config.vocabulary:
        raise ConfigError(
            f"ids range from {lowest} to {highest}; they must be in [0, {config.vocabulary})."
        )


def rows_without_padding(ids_BT: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Return the ids of each row whose ``attention_mask`` is not 0."""
    if attention_mask.shape != ids_BT.shape:
        raise ConfigError(
            f"attention_mask has shape {list(attention_mask.shape)}, ids have "
            f"{list(ids_BT.shape)}; give one of the same shape."
        )
    is_real_BT = attention_mask.bool()
    if not is_real_BT.any(dim=1).all():
        raise ConfigError("attention_mask hides all of a row; leave the row out.")
    return [ids_T[is_real_T] for ids_T, is_real_T in zip(ids_BT, is_real_BT, strict=True)]


def ids_of_row(prompt: Sequence[int] | Tensor) -> list[int]:
    """Return the ids of one prompt as a list."""
    ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
        raise ConfigError(f"prompt is {brief(prompt)}; give text, or the ids of one row.")
    return list(ids)


def brief(value: Any) -> str:
    """Name a value in an error."""
    if isinstance(value, Tensor):
        return f"a tensor of type {value.dtype} and shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
