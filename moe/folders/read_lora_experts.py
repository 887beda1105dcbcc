"""Read an adapter folder of LoRA experts for a decoder."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ModelFileError
from ...kernels.values.expert_update import ExpertUpdate
from ..adapters.adapter import Adapter, LowRankLinear
from ..adapters.routed import RoutedUpdate
from ..gated_mlp import GatedMLP
from ..linear import Linear
from ..models.decoder import Decoder
from ..models.decoder_layer import DecoderLayer
from .families.family import Family
from .lora_experts import TENSOR_FILE, LoraExpertsConfig, read_lora_experts_config
from .peft.config import LoraConfig
from .peft.experts import Stacked, cast, joined
from .peft.modules import ModuleNames
from .safetensors_file import SafetensorsFile

_ATTENTION = re.compile(r"(model\.layers\.[0-9]{1,6}\.self_attn\..+)\.lora_([AB])")
_MLP = re.compile(r"model\.layers\.([0-9]{1,6})\.mlp\.(.+)")


class LoraExpertsReader:
    """Reads adapter folders of LoRA experts for one decoder."""

    def __init__(self, decoder: Decoder, family: Family) -> None:
        self._like = decoder.embed_tokens.weight
        self._names = ModuleNames(decoder, family)
        self._layers = decoder.layers

    def read(self, name: str, folder: Path) -> Adapter:
        """Return the adapter in a folder, in the decoder's type; routers are in fp32.

        Raises :class:`ModelFileError`, in one sentence, for a folder that is damaged or that does
        not fit the decoder.
        """
        config, found = read_lora_experts_config(folder), _read_tensors(folder)
        pairs: dict[str, dict[str, Tensor]] = {}
        mlps: dict[int, dict[str, Tensor]] = {}
        for key, tensor in found.items():
            attention, mlp = _ATTENTION.fullmatch(key), _MLP.fullmatch(key)
            if attention is not None:
                pairs.setdefault(attention[1], {})[attention[2]] = tensor
            elif mlp is not None:
                mlps.setdefault(int(mlp[1]), {})[mlp[2]] = tensor
            else:
                raise ModelFileError(
                    f"{folder / TENSOR_FILE} has {key[:120]!r}, which is no part of LoRA experts "
                    "or of attention; export the adapter again."
                )
        linears = dict(self._linear(path, pair, config) for path, pair in pairs.items())
        routed = dict(self._mlp(layer, tensors, config) for layer, tensors in mlps.items())
        return Adapter(name, linears, {}, in_attention=bool(linears), mlps=routed)

    def _linear(
        self, name: str, pair: Mapping[str, Tensor], config: LoraExpertsConfig
    ) -> tuple[nn.Module, LowRankLinear]:
        plain = LoraConfig(config.rank, config.alpha)
        _, layer = self._names.find(name, {name}, plain)
        assert isinstance(layer, Linear), "attention has no experts"
        shapes = {
            "A": (config.rank, layer.in_features),
            "B": (layer.out_features, config.rank),
        }
        _check(f"{name}.lora_", pair, shapes)
        b_OP = pair["B"] * config.scale
        return layer, LowRankLinear(pair["A"].to(self._like), b_OP.to(self._like))

    def _mlp(
        self, index: int, tensors: Mapping[str, Tensor], config: LoraExpertsConfig
    ) -> tuple[nn.Module, RoutedUpdate]:
        """Return the MLP of a layer and its LoRA experts."""
        mlp = self._dense_mlp(index)
        d_model, d_ff = mlp.down_proj.weight.shape
        _check(f"model.layers.{index}.mlp.", tensors, config.mlp_shapes(d_model, d_ff))
        router = config.mixture.router(d_model)
        router.load_state_dict({name: tensors[f"router.{name}"] for name in ("weight", "bias")})
        router.requires_grad_(False).eval().to(self._like.device)

        def factors(projection: str) -> Stacked:
            b_EOP = tensors[f"{projection}.lora_B"] * config.scale
            return tensors[f"{projection}.lora_A"], b_EOP

        update = ExpertUpdate(
            cast(joined(factors("gate_proj"), factors("up_proj")), self._like),
            cast(factors("down_proj"), self._like),
        )
        return mlp, RoutedUpdate(router, update, config.weighting == "probability")

    def _dense_mlp(self, index: int) -> GatedMLP:
        if index >= len(self._layers):
            raise ModelFileError(
                f"the adapter changes layer {index}, but the model has {len(self._layers)} layers; "
                "it belongs to another model."
            )
        layer = self._layers[index]
        assert isinstance(layer, DecoderLayer), "served models are whole"
        if not isinstance(layer.mlp, GatedMLP):
            raise ModelFileError(
                f"the adapter has LoRA experts for layer {index}, which is a MoE layer here; it "
                "belongs to another model."
            )
        return layer.mlp


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in fp32."""
    if not (folder / TENSOR_FILE).exists():
        raise ModelFileError(f"{folder} has no {TENSOR_FILE}; export the adapter again.")
    file = SafetensorsFile(folder / TENSOR_FILE)
    found = {}
    try:
        for name, entry in file.entries.items():
            if not entry.dtype.is_floating_point:
                raise ModelFileError(
                    f"{file.path}: {name[:120]} is {entry.dtype}, not of floating-point numbers; "
                    "export the adapter again."
                )
            found[name] = torch.empty(entry.shape)
            file.read_into(name, found[name])
            if not found[name].isfinite().all():
                raise ModelFileError(
                    f"{file.path}: {name[:120]} holds numbers that are not finite; train it again."
                )
    except OSError as error:
        raise ModelFileError(f"{file.path} could not be read ({error}); copy it again.") from None
    finally:
        file.close()
    if not found:
        raise ModelFileError(f"{file.path} has no tensors; export the adapter again.")
    return found


def _check(path: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`ModelFileError` unless there are these tensors, and no others."""
    for name in sorted(shapes.keys() - tensors.keys()):
        raise ModelFileError(f"{path}{name} is missing; export the adapter again.")
    for name in sorted(tensors.keys() - shapes.keys()):
        raise ModelFileError(
            f"{path}{name[:120]} is no part of LoRA experts; export the adapter again."
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelFileError(
                f"{path}{name} has shape {list(tensors[name].shape)}, but adapter_config.json and "
                f"this model ask for {list(shape)}; it is of another model or rank."
            )
