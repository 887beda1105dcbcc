"""Several tokens of one step as one event."""

from collections.abc import Sequence as Items
from dataclasses import replace

from ..sequence import GenerationEvent


def joined(events: Items[GenerationEvent]) -> GenerationEvent:
    """Return one event with the texts and scores of all; the rest is the last one's."""
    if len(events) == 1:
        return events[0]
    return replace(
        events[-1],
        text="".join(event.text for event in events),
        logprobs=tuple(score for event in events for score in event.logprobs),
    )
