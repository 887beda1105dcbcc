"""Which versions bring a receiver to the newest one it can have. Knows no files."""

from collections.abc import Mapping


def path_to_newest(current: int | None, base_of: Mapping[int, int | None]) -> list[int]:
    """Return the versions to apply, oldest first; none if nothing newer can be reached.

    ``current`` is the receiver's version, None for one that has no published version yet.
    ``base_of`` has the versions that are there, in any order: the version that each changes, or
    None for full snapshots. The newest version that can be reached is taken, from ``current`` if
    its chain leads there and otherwise from the last full snapshot before it.
    """
    for newest in sorted(base_of, reverse=True):
        if current is not None and newest <= current:
            return []
        path = _path_to(newest, current, base_of)
        if path is not None:
            return path
    return []


def _path_to(
    version: int, current: int | None, base_of: Mapping[int, int | None]
) -> list[int] | None:
    """Return the versions from ``current`` or a full snapshot to ``version``."""
    path = [version]
    while (base := base_of[path[0]]) is not None and base != current:
        if base not in base_of or base >= path[0]:
            return None
        path.insert(0, base)
    return path
