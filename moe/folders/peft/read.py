"""Read an adapter folder of peft for a decoder."""

from pathlib import Path

from torch import nn

from ....errors import ConfigError, ModelFileError
from ....kernels.values.expert_update import ExpertUpdate
from ...adapters.adapter import Adapter, LowRankLinear
from ...attention.grouped_query import Attention
from ...attention.latent import LatentAttention
from ...config.model import ModelConfig
from ...linear import Linear
from ...models.decoder import Decoder
from ..families.family import Family
from .config import read_config
from .experts import ExpertSizes, update_of
from .modules import ExpertPart, ModuleNames
from .tensors import Factors, read_factors


class AdapterReader:
    """Reads adapter folders for one decoder."""

    def __init__(self, decoder: Decoder, family: Family) -> None:
        self._decoder = decoder
        self._like = decoder.embed_tokens.weight
        self._names = ModuleNames(decoder, family)
        self._sizes = _sizes(decoder.config, family)

    def read(self, name: str, folder: Path) -> Adapter:
        """Return the adapter in a folder, with the factor s in B, in the decoder's type.

        Raises :class:`ModelFileError`, in one sentence, for a folder that is damaged, for what is
        not offered (config.py), and for modules, shapes and ranks that do not fit the decoder;
        :class:`ConfigError` for updates of experts whose channels answers choose.
        """
        config, factors = read_config(folder), read_factors(folder)
        linears: dict[nn.Module, LowRankLinear] = {}
        parts: dict[int, dict[tuple[str, int | None], Factors]] = {}
        for module, pair in factors.items():
            full, target = self._names.find(module, set(factors), config)
            self._check(full, pair, target, config.rank_of(full))
            scaled = Factors(pair.a, pair.b * config.scale(full))
            if isinstance(target, Linear):
                linears[target] = LowRankLinear(*(part.to(self._like) for part in scaled))
            else:
                parts.setdefault(target.layer, {})[target.part, target.expert] = scaled
        if parts and self._decoder.core is not None:
            raise ConfigError(
                f"adapter {name!r} updates experts, but answers use core channels of them "
                "(expert-sparsity coreinfer); leave one out."
            )
        layers = dict(self._decoder.moe_layers())
        experts: dict[nn.Module, ExpertUpdate] = {
            layers[index].experts: update_of(of_layer, self._sizes, self._like)
            for index, of_layer in parts.items()
        }
        in_attention = any(layer in self._attention_layers() for layer in linears)
        return Adapter(name, linears, experts, in_attention)

    def _check(self, name: str, pair: Factors, target: Linear | ExpertPart, rank: int) -> None:
        """Raise :class:`ModelFileError` unless A and B have the shapes of the layer and rank."""
        if isinstance(target, Linear):
            num_inputs, num_outputs = target.in_features, target.out_features
        else:
            num_inputs, num_outputs = self._sizes.shape(target.part)
            rank *= self._sizes.num_experts if target.expert is None else 1
        wanted = [rank, num_inputs], [num_outputs, rank]
        found = list(pair.a.shape), list(pair.b.shape)
        if found != wanted:
            raise ModelFileError(
                f"A and B of {name} have shapes {found[0]} and {found[1]}, but adapter_config.json "
                f"and this model ask for {wanted[0]} and {wanted[1]}; it is of another model or "
                "rank."
            )

    def _attention_layers(self) -> set[nn.Module]:
        found = (m for m in self._decoder.modules() if isinstance(m, Attention | LatentAttention))
        return {layer for attention in found for layer in attention.modules()}


def _sizes(config: ModelConfig, family: Family) -> ExpertSizes:
    if config.moe is None:
        return ExpertSizes(0, config.d_model, 0)
    moe, is_interleaved = config.moe, family.model_type == "gpt_oss"
    has_gate = "gate" in moe.fc1_parts
    return ExpertSizes(moe.num_experts, config.d_model, moe.d_expert, is_interleaved, has_gate)
