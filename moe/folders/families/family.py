"""What a model family is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ...config.model import LayersConfig, ModelConfig
from ..expert_layouts import ExpertLayout
from .keys import COMMON, Values, check_only, complete, write_common

HEADS = ("lm_head.", "classifier.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How folders of one ``model_type`` express our configuration.

    Its tensors have our names, except for ``renames`` (ours, theirs) and the experts' layout.
    """

    model_type: str
    architecture: str
    """The class that opens such folders in transformers, or would open them."""
    read: Callable[[Values], LayersConfig]
    """Read a ``config.json`` in which no key of ``defaults`` is missing. May raise ``KeyError`` and
    ``TypeError`` for damaged ones."""
    write: Callable[[Any], Values]
    """Return the keys of ``config.json`` in addition to the common ones, for any model of this
    family's kind and parts (experts, latent attention). What it cannot express is left out."""
    experts: ExpertLayout
    defaults: Values = field(default_factory=lambda: dict(COMMON))
    """The values of missing keys."""
    may_be_null: tuple[str, ...] = ()
    """Keys that may be null although their default is not null."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names of keys, which override the keys."""
    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = "model."
    """In front of all names but those of the head."""
    activation: str | None = "silu"
    """The only ``hidden_act`` of the family; None = it has no such key."""
    own_quantization: str | None = None
    """The ``quant_method`` that the experts' layout reads by itself."""
    has_experts: bool = True
    has_latent: bool = False
    is_in_transformers: bool = True
    kinds: tuple[str, ...] = ("decoder",)
    """The kinds of models that it can express."""
    write_common: Callable[[Any], Values] = write_common
    """Return the keys of ``config.json`` that families of this kind share."""
    other_names: Callable[[str], tuple[str, ...]] = lambda name: (full_name(name),)
    """More names that folders may have for a tensor: ours, which transformers 5 uses in memory."""
    copies: tuple[str, ...] = ()
    """Tensors that folders may have in addition: the embedding again."""
    name_of: Callable[[str], str] | None = None
    """Return its name of a tensor, in place of ``renames`` and ``prefix``."""
    bind: Callable[["Family", LayersConfig], "Family"] = lambda family, config: family
    """Return the family for one model, where names of tensors depend on its configuration."""

    def complete(self, values: Values) -> Values:
        """Return a ``config.json`` with the family's values for missing keys."""
        return complete(values, self.defaults, self.may_be_null, self.aliases)

    def read_config(self, values: Values) -> LayersConfig:
        """Return the configuration in a ``config.json``."""
        values = self.complete(values)
        if self.activation is not None:
            check_only(values, {"hidden_act": self.activation})
        return self.read(values)

    def tensor_name(self, parameter: str) -> str:
        """Return the family's name of a decoder's tensor, such as ``layers.0.mlp.gate.weight``."""
        if self.name_of is not None:
            return self.name_of(parameter)
        for ours, theirs in self.renames:
            parameter = parameter.replace(ours, theirs)
        return full_name(parameter, self.prefix)

    def tensor_names(self, parameter: str) -> tuple[str, ...]:
        """Return all names that its folders may have for a tensor, the usual one first."""
        return self.tensor_name(parameter), *self.other_names(parameter)

    def config_values(self, config: LayersConfig) -> Values:
        """Return the ``config.json`` of a model that this family can express (:meth:`why_not`)."""
        head = {"model_type": self.model_type, "architectures": [self.architecture]}
        return head | self.write_common(config) | self.write(config)

    def why_not(self, config: LayersConfig) -> str | None:
        """Return the first field of ``config`` that this family cannot express, or None.

        Writes the configuration and reads it back: a field that changes cannot be expressed.
        """
        return self._why_impossible(config) or next(iter(self.differences(config)), None)

    def differences(self, config: LayersConfig) -> list[str]:
        """Return all fields that change; empty if the family cannot express the model at all."""
        if self._why_impossible(config) is not None:
            return []
        found = self.read_config(self.config_values(config)).architecture()
        return list(_differences(config.architecture(), found, self.model_type))

    def _why_impossible(self, config: LayersConfig) -> str | None:
        if config.kind not in self.kinds:
            return f"{self.model_type} models are no {config.kind}s"
        if (config.moe is not None) != self.has_experts:
            return f"{self.model_type} models have {'' if self.has_experts else 'no '}experts"
        if config.moe is not None and config.moe.router.kind != "topk":
            return f"moe.router is {config.moe.router.kind}, where {self.model_type} has topk"
        has_latent = isinstance(config, ModelConfig) and config.attention.latent is not None
        if has_latent != self.has_latent:
            is_latent = "latent" if self.has_latent else "grouped-query"
            return f"{self.model_type} models have {is_latent} attention"
        try:
            self.read_config(self.config_values(config))
        except ValidationError as error:
            return f"{self.model_type} cannot express it: {error.errors()[0]['msg']}"
        return None


def full_name(parameter: str, prefix: str = "model.") -> str:
    """Return our name of a tensor in folders."""
    return parameter if parameter.startswith(HEADS) else prefix + parameter


def _differences(ours: Values, theirs: Values, model_type: str, path: str = "") -> Iterator[str]:
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, model_type, f"{path}{key}.")
        elif value != other:
            yield f"{path}{key} is {value}, where {model_type} has {other}"
