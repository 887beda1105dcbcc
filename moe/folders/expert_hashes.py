"""A hash per expert, so that no changed byte is computed with.

``expert_hashes.json`` has ``layers``: for each layer a list of hexadecimal numbers, one per expert.
The hash is xxh3 of 64 bits over the expert's stored bytes that are read, in the order in which they
are on disk: by file name, then by place. (``weight_shape`` of the compressed-tensors format is not
read, so it is not part of it.) The hash finds damage, not forgery.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ...errors import ModelFileError
from ...files import read_small_file
from .shards import TensorPlan

FILE = "expert_hashes.json"
FORMAT, VERSION, ALGORITHM = "moeyard-expert-hashes", 1, "xxh3_64"
MAX_BYTES = 256 << 20

Key = tuple[int, int]
"""Layer and expert."""


class DamagedExpertError(OSError):
    """An expert's bytes are not those that they were; reading them again gave no others."""


class ExpertHashes(Protocol):
    """What the hashes of experts should be. Any thread may call."""

    @property
    def source(self) -> str:
        """Where that is known from, to follow "has other bytes than"."""
        ...

    @property
    def remedy(self) -> str:
        """What to do about an expert that has another hash."""
        ...

    def get(self, key: Key) -> int | None:
        """Return the hash of an expert, None if it is not known."""
        ...

    def learn(self, key: Key, digest: int) -> None:
        """Hear of the hash of an expert that was not known."""
        ...


class FolderHashes:
    """The hashes that the writer of a folder put there."""

    source = f"{FILE} says"
    remedy = f"copy the folder again, or delete {FILE} if you changed the weights on purpose"

    def __init__(self, hashes: dict[Key, int]) -> None:
        self._hashes = hashes

    def get(self, key: Key) -> int | None:
        """Return the hash of an expert, None if it is not known."""
        return self._hashes.get(key)

    def learn(self, key: Key, digest: int) -> None:
        """Do nothing: the file has every expert that its writer knew."""


def read_folder_hashes(folder: Path) -> FolderHashes | None:
    """Return the hashes of a folder, None if it has none.

    Raises :class:`ModelFileError` for a file that cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return FolderHashes(parse(json.loads(read_small_file(path, MAX_BYTES))))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} cannot be used ({error}); copy it again, or delete it to do without the check."
        ) from None


def parse(values: Any) -> dict[Key, int]:
    """Return the hashes in a file's JSON value; ``ValueError`` if it is of another kind."""
    head = {"format": FORMAT, "version": VERSION, "algorithm": ALGORITHM}
    if not isinstance(values, dict) or not isinstance(values.get("layers"), dict):
        raise ValueError("it has no object of layers")
    for name, wanted in head.items():
        if values.get(name) != wanted:
            raise ValueError(f"its {name} is {values.get(name)!r}, not {wanted!r}")
    hashes: dict[Key, int] = {}
    for layer, row in values["layers"].items():
        if not isinstance(row, list):
            raise ValueError(f"layer {layer} is not a list")
        for expert, text in enumerate(row):
            if text is None:
                continue
            if not isinstance(text, str) or len(text) != 16:
                raise ValueError(f"expert {expert} of layer {layer} has hash {text!r}")
            hashes[int(layer), expert] = int(text, 16)
    return hashes


def render(hashes: Iterable[tuple[Key, int]], more: dict[str, Any] | None = None) -> str:
    """Return the text of a file; experts that are not known are null."""
    layers: dict[int, dict[int, int]] = {}
    for (layer, expert), digest in hashes:
        layers.setdefault(layer, {})[expert] = digest
    rows = {
        str(layer): [_hexadecimal(row.get(expert)) for expert in range(max(row) + 1)]
        for layer, row in sorted(layers.items())
    }
    head = {"format": FORMAT, "version": VERSION, "algorithm": ALGORITHM}
    return json.dumps(head | (more or {}) | {"layers": rows}, indent=1) + "\n"


class HashWriter:
    """Hashes experts while they are written, tensor after tensor, in the order of the files."""

    def __init__(self) -> None:
        self._states: dict[Key, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    def add(self, plan: TensorPlan, start: int, data: memoryview) -> None:
        """Take bytes of a tensor, from its byte ``start`` on."""
        if plan.layer is None:
            return
        if plan.expert is not None:
            self._update((plan.layer, plan.expert), data)
            return
        row_bytes = plan.num_bytes // plan.shape[0]
        done = 0
        while done < len(data):
            row, used = divmod(start + done, row_bytes)
            piece = data[done : done + row_bytes - used]
            self._update((plan.layer, row), piece)
            done += len(piece)

    def text(self) -> str:
        """Return the text of expert_hashes.json."""
        return render((key, state.intdigest()) for key, state in self._states.items())

    def _update(self, key: Key, data: memoryview) -> None:
        self._states.setdefault(key, xxhash.xxh3_64()).update(data)


def _hexadecimal(digest: int | None) -> str | None:
    return None if digest is None else f"{digest:016x}"
