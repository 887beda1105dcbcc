"""The next layers' routers, fitted to the rows of this layer. L MoE layers, S layers, E experts.

What attention and experts of the layers in between do to a row is to a good part a linear function
of the row. So a matrix that was fitted to rows of a text foretells more than the routers do, and
costs as much. What the first layers choose depends mostly on the token, so its embedding foretells
that before the model begins. ``moeyard trace gates`` writes the file: a matrix ``[S * E, D]`` in
bf16 and a vector ``[S, E]`` for the embedding and for each MoE layer but the last.
"""

from pathlib import Path

from ....moe.models.model import Model
from . import predictor_file
from .gate_maps import GateMap, GateMaps
from .next_gates import NextGates
from .predictor import DISTANCE, PredictorFacts

NAME = "fitted_gates"
FORMAT = "moeyard-fitted-gates"


def save(path: Path, facts: PredictorFacts, maps: GateMaps) -> None:
    """Write fitted routers, whole or not at all; raises ``OSError``."""
    tensors = {}
    for name, fitted in zip(_names(facts), (maps.input, *maps.layers), strict=True):
        assert fitted is not None, "fitted maps have one for the input"
        tensors[f"{name}.weight"] = fitted.weight_RD.bfloat16().contiguous()
        tensors[f"{name}.bias"] = fitted.bias_SE.contiguous()
    predictor_file.save(path, FORMAT, facts, tensors)


def open_fitted_gates(path: Path, facts: PredictorFacts, decoder: Model) -> NextGates:
    """Return the predictor of a file; raises :class:`ConfigError` unless it is for this model."""

    def expected(_: predictor_file.Tensors) -> predictor_file.Shapes:
        shapes: predictor_file.Shapes = {}
        for name, ahead in _names(facts).items():
            shapes[f"{name}.weight"] = (ahead * facts.num_experts, decoder.config.d_model)
            shapes[f"{name}.bias"] = (ahead, facts.num_experts)
        return shapes

    found = predictor_file.read(path, NAME, FORMAT, facts, expected, "moeyard trace gates")
    dtype = next(decoder.parameters()).dtype
    first, *layers = (
        GateMap(found[f"{name}.weight"].to(dtype), found[f"{name}.bias"]) for name in _names(facts)
    )
    return NextGates(facts, decoder, GateMaps(layers, first))


def _names(facts: PredictorFacts) -> dict[str, int]:
    """Return what each map reads, and S: to how many layers it looks."""
    layers = {str(layer): len(facts.following(layer)) for layer in facts.foretelling}
    return {"input": len(facts.moe_layers[:DISTANCE]), **layers}
