"""How many replicas each expert gets: one more, again and again, to the most loaded replica."""

import heapq
from collections.abc import Sequence


def replicas_for(load_E: Sequence[float], slots: int, most: int) -> list[int]:
    """Share ``slots`` among experts: one each, then the next to the largest ``load / replicas``.

    No other numbers have a smaller largest load per replica (this is Adams' method of dividing
    seats). No expert gets more than ``most``; slots that would go beyond stay empty. Ties go to the
    expert with fewer replicas, then to the lower one.
    """
    assert slots >= len(load_E), "fewer slots than experts"
    replicas_E = [1] * len(load_E)
    queue = [(-float(load), 1, expert) for expert, load in enumerate(load_E) if most > 1]
    heapq.heapify(queue)
    for _ in range(slots - len(load_E)):
        if not queue:
            break
        _, count, expert = heapq.heappop(queue)
        replicas_E[expert] = count + 1
        if count + 1 < most:
            heapq.heappush(queue, (-float(load_E[expert]) / (count + 1), count + 1, expert))
    return replicas_E
