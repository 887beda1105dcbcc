"""The arguments of a server about adapters, and their checks."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator

from ..errors import ConfigError
from ..moe.adapters.table import AdapterTable
from ..moe.config.model import decoder_config
from ..moe.folders.adapters import adapter_table
from ..moe.folders.folder import ModelFolder
from ..moe.models.decoder import Decoder
from ..moe.without_memory import without_memory


class LoraArgs(BaseModel):
    """Which adapters a server has, and whether clients may change them."""

    lora: list[str] = []
    """Adapters as ``NAME=FOLDER``; a request's ``model`` names one. A string may join some by
    ``,``."""
    allow_lora_updates: bool = False
    """Whether clients with the key may load and unload adapters while the server runs."""

    @field_validator("lora", mode="before")
    @classmethod
    def _split_lora(cls, names: Any) -> Any:
        return names.split(",") if isinstance(names, str) else names

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, names: list[str]) -> list[str]:
        for name in names:
            if not all(name.partition("=")):
                raise ValueError(f"{name!r} is no adapter; use NAME=FOLDER.")
        return names

    def load_adapters(self, table: AdapterTable) -> None:
        """Load all adapters; raises the errors of :meth:`AdapterTable.load`."""
        for given in self.lora:
            name, _, folder = given.partition("=")
            table.load(name, Path(folder))


def check_adapters(
    args: LoraArgs, folder: ModelFolder, model_name: str, api_key: str | None, num_replicas: int
) -> None:
    """Refuse adapters that do not fit the model, and updates that cannot be allowed."""
    if any(given.partition("=")[0] == model_name for given in args.lora):
        raise ConfigError(f"lora names {model_name!r}, which is the model; use another name.")
    if args.allow_lora_updates and api_key is None:
        raise ConfigError(
            "allow-lora-updates lets clients name folders of this machine, and api-key is not set; "
            "set it."
        )
    if args.allow_lora_updates and num_replicas > 1:
        raise ConfigError(
            f"allow-lora-updates is set, but there are {num_replicas} replicas, and an update "
            "would reach one of them; use 1, or name the adapters with lora."
        )
    if args.lora:
        with without_memory():
            decoder = Decoder(decoder_config(folder.config), expert_ids=())
        args.load_adapters(adapter_table(decoder, folder.family))
