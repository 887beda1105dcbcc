"""The work folder of ``moeyard sparsify``: what is kept until the model is written.

It lies next to the target and goes when the target is there. The same command goes on with it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, ConfigError, ModelFileError
from ...files import replace_text, replaced

BEGUN = "begun.json"


class WorkFolder:
    """See the module. Raises :class:`ConfigError` for work of a command with other options."""

    def __init__(self, target: Path, begun: dict[str, Any]) -> None:
        if target.exists():
            raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
        self.path = target.with_name(f"{target.name}.work")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / BEGUN
        if not file.exists():
            replace_text(file, json.dumps(begun, indent=1) + "\n")
            return
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            before = {}
        for name, value in begun.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{self.path} was begun with {name} = {before.get(name)!r}, and now it is "
                    f"{value!r}; give the same, or remove the folder."
                )

    def order(self, layer: int) -> Tensor | None:
        """Return the cut of a layer, if it was made."""
        path = self._order_file(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                found: Tensor = file.get_tensor("order_F")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); remove it to cut the layer again."
            ) from None
        return found

    def save_order(self, layer: int, order_F: Tensor) -> None:
        """Keep the cut of a layer."""
        with replaced(self._order_file(layer)) as unfinished:
            save_file({"order_F": order_F}, unfinished)

    def remove(self) -> None:
        """Remove the folder: its work is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _order_file(self, layer: int) -> Path:
        return self.path / f"order-{layer:05d}.safetensors"


def text_identity(text: str) -> str:
    """Return a hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
