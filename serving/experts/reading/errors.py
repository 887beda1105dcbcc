"""What a request is told whose expert could not be read."""

from collections.abc import Sequence

from ....errors import ExpertReadError
from ....moe.folders.expert_hashes import DamagedExpertError
from ..reads import Read


def read_error(failed: Sequence[Read]) -> ExpertReadError:
    """Return the error for reads of a layer that failed for good."""
    layer, _ = failed[0].key
    damage = next((r.error for r in failed if isinstance(r.error, DamagedExpertError)), None)
    cause = damage or failed[0].error
    if damage is None:
        message = f"an expert of layer {layer} could not be read ({cause}); try again later."
    else:
        message = f"{damage}."  # it names the expert, and trying again is of no use
    error = ExpertReadError(message, experts=(read.key[1] for read in failed))
    error.__cause__ = cause
    return error
