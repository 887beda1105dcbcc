"""How the matrices of a folder are stored, as its ``quantization_config`` says."""

from typing import Any

from ...errors import ModelFileError
from .families.family import Family
from .group_sparse_format import METHOD as GROUP_SPARSE
from .group_sparse_format import StoredFormat, read_group_sparse_config
from .packed_schemes import PackedSchemes
from .quantized_config import read_quantization_config
from .two_of_four_format import METHOD as N_OF_M
from .two_of_four_format import read_two_of_four_config


def stored_format(values: Any, family: Family) -> StoredFormat | PackedSchemes | None:
    """Return the format that ``quantization_config`` names.

    None if there is none, and for a method of the family's own. Raises :class:`ModelFileError` for
    what is not read.
    """
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ModelFileError(
            f"config.json has quantization_config = {values!r}; use an object or leave it out."
        )
    method = values.get("quant_method")
    if method is not None and method == family.own_quantization:
        return None
    if method == GROUP_SPARSE:
        return read_group_sparse_config(values)
    if method == N_OF_M:
        return read_two_of_four_config(values)
    return read_quantization_config(values)
