"""Simulate tasks on three resources, each of which runs its tasks in the order they were issued."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Resource = Literal["inter", "intra", "compute"]
"""The link between nodes, the links inside a node, and the device that computes."""
RESOURCES: tuple[Resource, ...] = get_args(Resource)

Kind = Literal["dispatch", "gather", "experts", "scatter", "combine", "gradients", "beside"]
LETTERS: dict[Kind, str] = {
    "dispatch": "D",
    "gather": "G",
    "experts": "E",
    "scatter": "S",
    "combine": "C",
    "gradients": "R",
    "beside": "B",
}


@dataclass(frozen=True, slots=True)
class Task:
    """Work that holds one resource."""

    kind: Kind
    number: int
    """From 0 among tasks of its kind: the chunk, or the slice of gradients."""
    resource: Resource
    seconds: float
    after: tuple[int, ...] = ()
    """Positions of the tasks that must have ended, all earlier in the list of tasks."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each task runs, in seconds from the beginning."""

    tasks: tuple[Task, ...]
    starts_s: tuple[float, ...]
    ends_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """When the last task ends."""
        return max(self.ends_s, default=0.0)

    def busy_s(self, resource: Resource) -> float:
        """Return how long a resource works."""
        return sum(task.seconds for task in self.tasks if task.resource == resource)

    def free_windows(self, resource: Resource) -> list[tuple[float, float]]:
        """Return the times, from start to end, at which a resource waits, up to the last end."""
        windows, free_from = [], 0.0
        for task, start, end in zip(self.tasks, self.starts_s, self.ends_s, strict=True):
            if task.resource == resource:
                if start > free_from:
                    windows.append((free_from, start))
                free_from = end
        if self.seconds > free_from:
            windows.append((free_from, self.seconds))
        return windows


def simulate(tasks: Sequence[Task], contention: float = 0.0) -> Timeline:
    """Run ``tasks``, each as soon as its resource and the tasks it waits for allow.

    The order of the list is the order in which a resource runs its tasks, as on a CUDA stream.
    While compute and a link work at the same time, all that runs takes ``1 + contention`` times as
    long: with 0 they do not disturb each other, and with 1 overlap gains nothing.
    """
    waiting = {
        resource: deque(n for n, task in enumerate(tasks) if task.resource == resource)
        for resource in RESOURCES
    }
    running: dict[Resource, int] = {}
    left_s = [task.seconds for task in tasks]
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    ended: set[int] = set()
    now = 0.0
    while len(ended) < len(tasks):
        for resource, queue in waiting.items():
            if resource not in running and queue and ended.issuperset(tasks[queue[0]].after):
                running[resource] = queue.popleft()
                starts[running[resource]] = now
        assert running, "a task waits for a later one"
        is_shared = "compute" in running and len(running) > 1
        elapsed = min(left_s[task] for task in running.values())
        now += elapsed * (1 + contention) if is_shared else elapsed
        for resource, task in list(running.items()):
            left_s[task] -= elapsed
            if left_s[task] <= 0:
                ends[task] = now
                ended.add(task)
                del running[resource]
    return Timeline(tuple(tasks), tuple(starts), tuple(ends))


def drawing(timeline: Timeline, columns: int = 72) -> str:
    """Return the timeline as text: a line for each resource, ``.`` where it waits.

    Tasks are a letter and their number from 1: D dispatch, G gather, E experts, S scatter, C
    combine, R gradients, B the shared expert beside them.
    """
    lines = []
    width = max(map(len, RESOURCES))
    per_second = columns / timeline.seconds if timeline.seconds else 0.0
    for resource in RESOURCES:
        line = ["."] * columns
        for task, start, end in zip(
            timeline.tasks, timeline.starts_s, timeline.ends_s, strict=True
        ):
            first, last = round(start * per_second), round(end * per_second)
            if task.resource == resource and last > first:
                name = f"{LETTERS[task.kind]}{task.number + 1}"[: last - first]
                line[first:last] = name.ljust(last - first, "-")
        lines.append(f"{resource:{width}} {''.join(line)}")
    return "\n".join(lines)
