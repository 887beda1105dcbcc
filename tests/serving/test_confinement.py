"""What fails in a step ends the requests that need it; the others' texts stay what they were."""

from contextlib import contextmanager

import pytest
import torch

from moeyard.errors import RequestError
from moeyard.kernels.values.memory import is_out_of_memory
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from test_engine import GREEDY, latin, prompts, request, run

PROMPTS = prompts(5)


def allocate_too_much() -> torch.Tensor:
    """Fail as torch's own allocator does."""
    return torch.empty(1 << 60, dtype=torch.uint8)


def engine_of(model, store=None, seats=5):
    return Engine(model, latin, store, max_num_seqs=seats, prefill_chunk=16)


def asked(max_tokens=8) -> list[GenerationRequest]:
    options = {"max_tokens": max_tokens}
    return [request(str(index), prompt, **options) for index, prompt in enumerate(PROMPTS)]


def short_ones() -> list[GenerationRequest]:
    """Short enough to leave some experts alone, but for one that is read in chunks."""
    lengths = enumerate((1, 2, 1, 3, 40, 2))
    return [request(str(n), range(9 * n, 9 * n + size), max_tokens=4) for n, size in lengths]


def choices_of(model) -> dict[str, set[tuple[int, int]]]:
    """Run every request alone and return the (layer, expert) pairs it chose."""
    layers = [index for index, _ in model.decoder.moe_layers()]
    chosen: dict[str, set[tuple[int, int]]] = {}
    for one in short_ones():
        engine, found = engine_of(model), set()

        def count(routings, found=found):
            for layer, routing in zip(layers, routings, strict=True):
                found.update((layer, expert) for expert in routing.experts_TK.unique().tolist())

        engine.metrics.count_routing = count
        run(engine, [one])
        chosen[one.request_id] = found
    return chosen


def test_torchs_and_pythons_allocator_errors_are_known_and_no_others():
    with pytest.raises(RuntimeError) as error:
        allocate_too_much()
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


@pytest.mark.usefixtures("reads_by_parts")
@pytest.mark.parametrize(("dtype", "stagger"), [("bfloat16", 0), ("bfloat16", 2), ("float32", 1)])
def test_an_unreadable_expert_ends_the_requests_that_chose_it_and_no_others(
    model_folder, monkeypatch, dtype, stagger
):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    resident, _ = open_model(model_folder, dtype)
    expected, chosen = {}, choices_of(resident)
    for one in short_ones():
        expected |= run(engine_of(resident), [one])[0]
    users = {key: {name for name in chosen if key in chosen[name]} for key in chosen["4"]}
    key = min(users, key=lambda key: abs(len(users[key]) - 3))
    assert 0 < len(users[key]) < len(chosen), "the expert must matter to some requests, not to all"

    model, store = open_model(model_folder, dtype, expert_memory="25%")
    reads = ModelFolder.expert_reads

    def read(folder, layer, expert, views, *more):
        def fail():
            raise OSError(5, "Input/output error")

        return [fail] if (layer, expert) == key else reads(folder, layer, expert, views, *more)

    monkeypatch.setattr(ModelFolder, "expert_reads", read)
    texts, reasons, errors = run(engine_of(model, store), short_ones(), stagger=stagger)
    assert {name for name, reason in reasons.items() if reason == "error"} == users[key]
    for name, text in expected.items():
        if name in users[key]:
            error = errors[name]
            assert text.startswith(texts[name]) and "could not be read" in str(error)
            assert error.status == 503 and error.retry_after_s > 0
        else:
            assert texts[name] == text
    store.close()


def test_a_cache_that_could_not_grow_is_as_it_was(model_folder, monkeypatch):
    model, _ = open_model(model_folder)
    cache = model.decoder.new_cache(200)
    cache.reserve(10)
    before = (cache.capacity, list(cache.addresses))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1 << 60))
        with pytest.raises(RuntimeError, match="memory"):
            cache.reserve(100)
    assert (cache.capacity, list(cache.addresses)) == before
    cache.reserve(100)
    assert cache.capacity >= 100


@contextmanager
def short_of_memory(model, method, most_rows):
    """Let a method of the decoder fail with more than so many rows together."""
    decoder, whole = model.decoder, getattr(model.decoder, method)

    def limited(batch_or_rows):
        rows = batch_or_rows if isinstance(batch_or_rows, torch.Tensor) else batch_or_rows.ids_T
        if len(rows) > most_rows:
            allocate_too_much()
        return whole(batch_or_rows)

    setattr(decoder, method, limited)
    yield
    setattr(decoder, method, whole)


@pytest.mark.parametrize(
    ("method", "most_rows"), [("forward", 17), ("logits", 1)], ids=["forward", "scores"]
)
def test_a_step_too_large_for_the_memory_is_taken_in_parts(model_folder, method, most_rows):
    model, _ = open_model(model_folder, "bfloat16")
    expected = run(engine_of(model), asked())
    with short_of_memory(model, method, most_rows):
        assert run(engine_of(model), asked()) == expected


def test_only_requests_too_large_even_alone_end_for_want_of_memory(model_folder):
    model, _ = open_model(model_folder, "bfloat16")
    expected = run(engine_of(model), asked())[0]
    large = {str(index) for index, prompt in enumerate(PROMPTS) if len(prompt) > 12}
    assert 0 < len(large) < len(PROMPTS)
    with short_of_memory(model, "forward", 12):
        # One after the other: prompts that come together are read in smaller parts.
        texts, reasons, errors = run(engine_of(model), asked(), stagger=5)
    assert {name for name, reason in reasons.items() if reason == "error"} == large
    assert all("no memory left" in str(errors[name]) for name in large)
    assert all(texts[name] == expected[name] for name in expected if name not in large)


def test_text_that_cannot_be_decoded_ends_its_request_alone(model_folder):
    model, _ = open_model(model_folder)
    expected = run(engine_of(model), asked())[0]
    refused = expected["2"][5]

    def decode(ids):
        if refused in latin(ids):
            raise RequestError("the tokenizer cannot spell it")
        return latin(ids)

    engine = Engine(model, decode, None, max_num_seqs=5, prefill_chunk=16)
    texts, reasons, _ = run(engine, asked())
    failed = {name for name, reason in reasons.items() if reason == "error"}
    assert "2" in failed and failed != set(expected)
    assert all(texts[name] == expected[name] for name in expected if name not in failed)


def test_what_is_no_shortage_of_memory_is_our_bug_and_raised(model_folder):
    model, _ = open_model(model_folder)
    engine = engine_of(model)
    engine.add(request("a", [1, 2], sampling=GREEDY))
    model.decoder.forward = lambda batch: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        engine.step()
