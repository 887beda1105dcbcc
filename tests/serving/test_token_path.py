"""From a step of the engine to the bytes of a stream: order, completeness, one hand-over."""

import asyncio
import json
import threading

import pytest

from moeyard.errors import RequestError
from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.api.chat import ChatWording, parse_chat
from moeyard.serving.api.chunks import Chunks
from moeyard.serving.api.completions import CompletionWording, parse_completion
from moeyard.serving.api.responses import sse
from moeyard.serving.engine.sequence import GenerationEvent, GenerationRequest
from moeyard.serving.engine.thread import EngineThread

TEXTS = ["a", " ", '"quoted" \\ \n\t\0', "näïve \u2028 漢字", "\U0001f600", "\ufffd", "{} % {0} %s"]


class Countdown:
    """An engine whose requests get one event per step, all in the same steps."""

    def __init__(self):
        self.left = {}
        self.cancelled = []

    @property
    def has_work(self):
        return bool(self.left)

    def add(self, request):
        if not request.prompt_ids:
            raise RequestError("prompt is empty; give one.")
        self.left[request.request_id] = request.max_tokens

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self.left.pop(request_id, None)

    def step(self):
        events = []
        for name in list(self.left):
            self.left[name] -= 1
            reason = None if self.left[name] else "length"
            events.append(GenerationEvent(name, f"{name}{self.left[name]} ", 1, reason))
            if reason:
                del self.left[name]
        return events


def request(name, max_tokens, ids=(1,)):
    return GenerationRequest(name, ids, max_tokens, SamplingParams())


@pytest.fixture
def thread():
    running = EngineThread(Countdown())
    yield running
    running.stop()


async def texts(thread, *requests):
    """Return the texts of requests put together, and the sizes of the lists they came in."""
    found, sizes = [""] * len(requests), []
    async for events in thread.generate(requests):
        sizes.append(len(events))
        for index, event in events:
            assert event.error is None
            found[index] += event.text
    return found, sizes


def test_all_events_of_a_step_cross_in_one_call(thread):
    async def ask():
        loop, calls = asyncio.get_running_loop(), []
        hand_over = loop.call_soon_threadsafe

        def counted(*args):
            calls.append(args)
            return hand_over(*args)

        loop.call_soon_threadsafe = counted
        answer = await texts(thread, *(request(name, 20) for name in "abcdef"))
        return answer, len(calls)

    (found, _), num_calls = asyncio.run(ask())
    assert found == ["".join(f"{name}{i} " for i in range(19, -1, -1)) for name in "abcdef"]
    assert num_calls == 20


def test_a_reader_that_comes_late_takes_all_that_waits_in_order(thread):
    step, may_step = thread.engine.step, threading.Semaphore(1)
    thread.engine.step = lambda: may_step.acquire(timeout=30) and step()

    async def ask():
        batches = thread.generate([request("a", 30), request("b", 30)])
        first = await anext(batches)
        may_step.release(29)
        while thread.engine.has_work:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        return first, [batch async for batch in batches]

    first, rest = asyncio.run(ask())
    assert len(first) == 2 and [len(batch) for batch in rest] == [58]
    for index in (0, 1):
        numbers = [int(e.text[1:]) for i, e in [*first, *rest[0]] if i == index]
        assert numbers == list(range(29, -1, -1))


def test_readers_are_apart_and_each_request_ends_once(thread):
    async def ask():
        groups = [[request(f"{g}{i}-", 1 + 3 * i + g) for i in range(4)] for g in range(5)]
        return await asyncio.gather(*(texts(thread, *group) for group in groups))

    for g, (found, _) in enumerate(asyncio.run(ask())):
        for i, text in enumerate(found):
            assert text.split() == [f"{g}{i}-{n}" for n in range(3 * i + g, -1, -1)]
    assert thread._readers == {} and thread.engine.cancelled == []


def test_leaving_early_cancels_what_has_not_ended(thread):
    async def ask():
        batches = thread.generate([request("short", 1), request("long", 10**9)])
        seen = set()
        while len(seen) < 2:
            seen |= {index for index, _ in await anext(batches)}
        await batches.aclose()
        while thread.engine.has_work:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert thread.engine.cancelled == ["long"] and thread._readers == {}


class Kept:
    """An outlet that keeps what it takes, until it takes nothing more."""

    def __init__(self, most=10**9):
        self.taken, self._most, self.flushes = [], most, 0

    def take(self, index, event):
        assert threading.current_thread().name == "engine" and event.finish_reason is None
        if len(self.taken) == self._most:
            return False
        self.taken.append((index, event.text))
        return True

    def flush(self):
        self.flushes += 1


@pytest.mark.parametrize("most", [10**9, 7, 0], ids=["all", "some", "none"])
def test_an_outlet_takes_what_ends_nothing_and_the_rest_wakes_the_loop(thread, most):
    outlet = Kept(most)

    async def ask():
        batches = thread.generate([request("a", 20), request("b", 10)], outlet)
        return [pair async for batch in batches for pair in batch]

    came = [(index, event.text) for index, event in asyncio.run(ask())]
    assert len(outlet.taken) == min(most, 28) and outlet.flushes >= len(outlet.taken) / 2
    assert len(came) == 30 - len(outlet.taken)
    for index, name, count in ((0, "a", 20), (1, "b", 10)):
        found = [text for i, text in [*outlet.taken, *came] if i == index]
        assert found == [f"{name}{n} " for n in range(count - 1, -1, -1)]


def test_an_outlet_gets_nothing_after_its_reader_has_left(thread):
    outlet = Kept()
    thread.engine.cancel = lambda request_id: None  # it goes on

    async def ask():
        batches = thread.generate([request("short", 1), request("long", 10**9)], outlet)
        await anext(batches)
        while not outlet.taken:
            await asyncio.sleep(0.001)
        await batches.aclose()
        taken, left = len(outlet.taken), thread.engine.left["long"]
        while thread.engine.left["long"] > left - 100:
            await asyncio.sleep(0.001)
        return taken

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == len(outlet.taken)


def test_a_refused_request_ends_with_an_error_event_and_the_others_go_on(thread):
    async def ask():
        batches = thread.generate([request("a", 3), request("b", 3, ids=())])
        return [pair async for batch in batches for pair in batch]

    events = asyncio.run(ask())
    errors = [index for index, event in events if event.error is not None]
    assert errors == [1] and len(events) == 4


def wordings(**changes):
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}], **changes}
    text = {"model": "m", "prompt": "a", **changes}
    return [
        ChatWording(parse_chat(json.dumps(chat).encode()), None),
        CompletionWording(parse_completion(json.dumps(text).encode()), None),
    ]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("which", [0, 1], ids=["chat", "completion"])
def test_chunks_are_the_bytes_that_encoding_them_whole_gives(text, which):
    wording = wordings()[which]
    head = {"id": "x", "object": "o", "created": 1, "model": 'na"me {} %s', "choices": []}
    chunks = Chunks(head, wording)
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    cases = [
        GenerationEvent("r", text, 3),
        GenerationEvent("r", text, 4, "length"),
        GenerationEvent("r", "", 5, "stop", stop_token=7),
    ]
    for index in (0, 1, 0):
        for event in cases:
            whole = {**head, "choices": [wording.chunk(index, event)]}
            assert chunks.event(index, event, None) == sse(whole)
            assert chunks.event(index, event, usage) == sse({**whole, "usage": usage})


def test_a_chunk_is_not_worded_anew_for_every_token(monkeypatch):
    for wording in wordings():
        worded = []
        chunk = wording.chunk
        monkeypatch.setattr(wording, "chunk", lambda *a, c=chunk, w=worded: w.append(a) or c(*a))
        chunks = Chunks({"id": "x", "choices": []}, wording)
        for n in range(50):
            chunks.event(n % 2, GenerationEvent("r", f"t{n}", n), None)
        assert len(worded) == 2
