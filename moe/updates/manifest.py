"""What an update says about itself: the file ``update.json``.

An update is a folder with this file and ``model.safetensors``, whose tensors have the names of an
export. It has whole units: an expert of a layer, or another tensor of the decoder. Each unit has a
hash, xxh3 of 64 bits over its stored bytes in the order of the file. So has the header of
``model.safetensors``, and so has ``update.json`` itself. Hashes find damage, not forgery.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import xxhash

from ...errors import ModelFileError
from ...files import read_small_file

FILE = "update.json"
FORMAT, FORMAT_VERSION = "moeyard-update", 1
MAX_BYTES = 256 << 20

Key = tuple[int, int] | str
"""A unit: layer and expert, or the decoder's name of a tensor outside the experts."""
What = Literal["all", "experts"]


class UpdateError(ModelFileError):
    """Version ``version`` cannot be applied."""

    def __init__(self, version: int, message: str) -> None:
        super().__init__(message)
        self.version = version


@dataclass(frozen=True, slots=True)
class Unit:
    """What is known of a unit without reading it."""

    dtype: str
    """torch's name of the stored type, such as ``bfloat16``."""
    num_bytes: int
    digest: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``update.json`` says."""

    version: int
    """From 1 on; later updates have larger numbers."""
    base: int | None
    """The version that it changes; None for a full snapshot, which has every unit."""
    run: str
    """Names the run that publishes."""
    architecture: str
    """Hash of the architecture, as in route files (:class:`ModelIdentity`)."""
    what: What
    """Which units the run publishes: all, or those of experts alone."""
    step: int
    """Of the run, after which the values are those of the update."""
    published: float
    """Unix time in seconds at which that step was done."""
    header: int
    """Hash of the header of ``model.safetensors``."""
    units: Mapping[Key, Unit]

    @property
    def is_full(self) -> bool:
        """Say whether it needs no other version."""
        return self.base is None

    @property
    def num_bytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.num_bytes for unit in self.units.values())


def render(manifest: Manifest) -> str:
    """Return the text of ``update.json``."""
    facts = asdict(manifest) | {"header": _hexadecimal(manifest.header)}
    facts["units"] = [_named(key) | _facts(unit) for key, unit in manifest.units.items()]
    values = {"format": FORMAT, "format_version": FORMAT_VERSION} | facts
    return json.dumps(values | {"hash": _hash_of(values)}, indent=1) + "\n"


def read_manifest(folder: Path, version: int) -> Manifest:
    """Return what the update in ``folder`` says; raises :class:`UpdateError` if it is damaged."""
    path = folder / FILE
    try:
        return _parse(json.loads(read_small_file(path, MAX_BYTES)), version)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason
        raise UpdateError(
            version,
            f"{path} cannot be used ({reason}); the version before stays until the next whole one.",
        ) from None


def _parse(values: dict[str, Any], version: int) -> Manifest:
    wanted = {"format": FORMAT, "format_version": FORMAT_VERSION}
    for name, value in wanted.items():
        if values[name] != value:
            raise ValueError(f"its {name} is {values[name]!r}, not {value!r}")
    if values.pop("hash") != _hash_of(values):
        raise ValueError("it has other bytes than its hash says")
    if values["version"] != version or values["what"] not in get_args(What):
        raise ValueError(f"it is version {values['version']!r} of {values['what']!r}")
    units = {_key_of(item): _unit_of(item) for item in values.pop("units")}
    facts = {name: value for name, value in values.items() if name not in wanted}
    return Manifest(**facts | {"header": int(values["header"], 16)}, units=units)


def _hash_of(values: dict[str, Any]) -> str:
    return _hexadecimal(xxhash.xxh3_64_intdigest(json.dumps(values, sort_keys=True).encode()))


def _named(key: Key) -> dict[str, Any]:
    return {"tensor": key} if isinstance(key, str) else {"layer": key[0], "expert": key[1]}


def _key_of(item: dict[str, Any]) -> Key:
    return cast(str, item["tensor"]) if "tensor" in item else (item["layer"], item["expert"])


def _facts(unit: Unit) -> dict[str, Any]:
    return {"dtype": unit.dtype, "bytes": unit.num_bytes, "hash": _hexadecimal(unit.digest)}


def _unit_of(item: dict[str, Any]) -> Unit:
    return Unit(item["dtype"], item["bytes"], int(item["hash"], 16))


def _hexadecimal(digest: int) -> str:
    return f"{digest:016x}"
