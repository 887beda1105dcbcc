"""Write an update, whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from ...files import new_folder
from ..folders.shards import TensorPlan, fill_shards, header
from ..folders.tensor_files import WEIGHTS
from ..folders.writer import bytes_of
from .manifest import FILE, Key, Manifest, Unit, What, render


@dataclass(frozen=True, slots=True)
class Head:
    """What a manifest says apart from the units."""

    version: int
    base: int | None
    run: str
    architecture: str
    what: What
    step: int
    published: float


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """The tensors of a unit, as they will be in the file."""

    key: Key
    plans: Sequence[TensorPlan]

    def digest(self) -> int:
        """Compute the unit's bytes and return their hash."""
        state = xxhash.xxh3_64()
        for data in self._bytes():
            state.update(data)
        return state.intdigest()

    def described(self, digest: int) -> Unit:
        """Return what a manifest says of it."""
        dtype = str(self.plans[0].dtype).removeprefix("torch.")
        return Unit(dtype, sum(plan.num_bytes for plan in self.plans), digest)

    def _bytes(self) -> Iterator[memoryview]:
        for plan in self.plans:
            yield from bytes_of(plan)


def units_of(plans: Sequence[TensorPlan], parameter_of: Mapping[str, str]) -> list[UnitPlan]:
    """Return the units of a model, in the order of a file.

    ``parameter_of`` maps the stored names of tensors outside the experts to the decoder's.
    """
    (shard,) = fill_shards(plans, limit=sum(plan.num_bytes for plan in plans))
    keyed = ((_key_of(plan, parameter_of), plan) for plan in shard)
    return [
        UnitPlan(key, [plan for _, plan in group])
        for key, group in groupby(keyed, key=lambda pair: pair[0])
    ]


def write_update(target: Path, head: Head, units: Sequence[UnitPlan]) -> Manifest:
    """Write ``units`` as the update ``target``, which appears when it is complete and on disk.

    ``OSError`` where it cannot be written; nothing is left behind then. A killed attempt leaves a
    hidden folder.
    """
    plans = [plan for unit in units for plan in unit.plans]
    first = header(plans)
    digests: dict[Key, Any] = {unit.key: xxhash.xxh3_64() for unit in units}
    with new_folder(target) as unfinished:
        with (unfinished / WEIGHTS).open("wb") as out:
            out.write(first)
            for unit in units:
                for plan in unit.plans:
                    for data in bytes_of(plan):
                        out.write(data)
                        digests[unit.key].update(data)
                        del data  # free it before the next piece is made
        manifest = Manifest(
            version=head.version,
            base=head.base,
            run=head.run,
            architecture=head.architecture,
            what=head.what,
            step=head.step,
            published=head.published,
            header=xxhash.xxh3_64_intdigest(first),
            units={unit.key: unit.described(digests[unit.key].intdigest()) for unit in units},
        )
        (unfinished / FILE).write_text(render(manifest), encoding="utf-8")
    return manifest


def _key_of(plan: TensorPlan, parameter_of: Mapping[str, str]) -> Key:
    if plan.layer is None:
        return parameter_of[plan.name]
    assert plan.expert is not None, f"{plan.name} has several experts"
    return plan.layer, plan.expert
