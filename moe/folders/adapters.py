"""Adapter folders of any kind, read for one decoder."""

from pathlib import Path

from ...errors import ModelFileError
from ..adapters.adapter import Adapter
from ..adapters.table import AdapterTable
from ..models.decoder import Decoder
from .families.family import Family
from .lora_experts import is_lora_experts
from .peft.read import AdapterReader
from .read_lora_experts import LoraExpertsReader


def adapter_table(decoder: Decoder, family: Family) -> AdapterTable:
    """Return an empty table for a decoder that came from a folder of ``family``.

    It reads plain LoRA folders of peft, and folders of LoRA experts.
    """

    def read(name: str, folder: Path) -> Adapter:
        try:
            if not folder.is_dir():
                raise ModelFileError(f"{folder} is no folder; give an adapter's.")
            kind = LoraExpertsReader if is_lora_experts(folder) else AdapterReader
            return kind(decoder, family).read(name, folder)
        except ModelFileError as error:
            raise ModelFileError(f"adapter {name!r}: {error}") from None

    return AdapterTable(read)
