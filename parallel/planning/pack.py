"""Pack weighted items into packs that hold equally many, heaviest first."""

from collections.abc import Hashable, Sequence


def balanced_packs(
    weights: Sequence[float], kinds: Sequence[Hashable], num_packs: int, room: int
) -> list[list[int]]:
    """Return the items of each pack: no more than ``room``, and no two of one kind.

    The heaviest item goes first, each to the lightest pack with room (then the one with fewer
    items, then the lower one). Where only packs with the same kind have room, an item of another
    pack makes way. There must be room for all, and no kind may have more items than packs.
    """
    assert len(weights) <= num_packs * room, "more items than room"
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    inside: list[set[Hashable]] = [set() for _ in range(num_packs)]
    sums = [0.0] * num_packs

    def put(item: int, pack: int) -> None:
        packs[pack].append(item)
        inside[pack].add(kinds[item])
        sums[pack] += weights[item]

    def take(item: int, pack: int) -> None:
        packs[pack].remove(item)
        inside[pack].remove(kinds[item])
        sums[pack] -= weights[item]

    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        has_room = [p for p in range(num_packs) if len(packs[p]) < room]
        fits = [p for p in has_room if kinds[item] not in inside[p]]
        if fits:
            put(item, min(fits, key=lambda p: (sums[p], len(packs[p]), p)))
            continue
        # Such a swap exists: a full pack without this kind has more kinds than one with room.
        swaps = [
            (max(sums[full] - weights[other] + weights[item], sums[free] + weights[other]), *place)
            for free in has_room
            for full in range(num_packs)
            if kinds[item] not in inside[full]
            for other in packs[full]
            if kinds[other] not in inside[free]
            for place in [(free, full, other)]
        ]
        _, free, full, other = min(swaps)
        take(other, full)
        put(other, free)
        put(item, full)
    return packs
