"""Files of predictors: safetensors whose header names the model that they are for."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ....errors import ConfigError
from ....files import replaced
from .predictor import PredictorFacts

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def save(path: Path, format_name: str, facts: PredictorFacts, tensors: Tensors) -> None:
    """Write a file, whole or not at all; raises ``OSError``."""
    metadata = {"format": format_name, "version": "1", **_model(facts)}
    with replaced(path) as unfinished:
        # save_file raises errors that are no OSError
        unfinished.write_bytes(to_bytes(tensors, metadata=metadata))


def read(
    path: Path,
    name: str,
    format_name: str,
    facts: PredictorFacts,
    shapes_of: Callable[[Tensors], Shapes],
    command: str,
) -> Tensors:
    """Return the tensors of a file for the predictor ``name``.

    ``shapes_of`` says what they must be, and ``command`` writes such files. Raises
    :class:`ConfigError` unless the file is one, and for this model.
    """
    spec, remedy = f"{name}:{path}", f"give a file that {command} wrote"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"expert_predictor {spec} cannot be read ({error}); {remedy}.") from None
    if metadata.get("format") != format_name:
        raise ConfigError(f"expert_predictor {spec} is not a predictor; {remedy}.")
    for field, value in _model(facts).items():
        if metadata.get(field) != value:
            raise ConfigError(
                f"expert_predictor {spec} belongs to another model: {field} is "
                f"{metadata.get(field)}, this one has {value}; make one for this model."
            )
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != shapes_of(tensors):
        raise ConfigError(
            f"expert_predictor {spec} is damaged: it has other tensors than its header says; write "
            "it again."
        )
    return tensors


def _model(facts: PredictorFacts) -> dict[str, str]:
    return {
        "architecture": facts.architecture,
        "moe_layers": ",".join(map(str, facts.moe_layers)),
        "num_experts": str(facts.num_experts),
    }
