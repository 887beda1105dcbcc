"""The engine: batching changes nothing, requests end when they should, failures stay local."""

import os

import pytest
import torch

from moeyard.errors import RequestError
from moeyard.moe.models.sampling import SamplingParams, sample
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

GREEDY = SamplingParams(temperature=0)


def latin(ids):
    """One character per token, so that texts show tokens."""
    return "".join(chr(0x100 + i) for i in ids)


def request(name, prompt, **options):
    defaults = {"max_tokens": 24, "sampling": GREEDY}
    return GenerationRequest(name, tuple(prompt), **{**defaults, **options})


def run(engine, requests, stagger=0):
    """Add requests, ``stagger`` steps apart, and return text, reason and events of each."""
    texts, reasons, errors = {}, {}, {}
    waiting, steps = list(requests), 0
    while waiting or engine.has_work:
        if waiting and steps % max(1, stagger) == 0:
            for _ in range(1 if stagger else len(waiting)):
                engine.add(waiting.pop(0))
        for event in engine.step():
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
                errors[event.request_id] = event.error
        steps += 1
        assert steps < 2000
    return texts, reasons, errors


def prompts(count):
    g = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 60, (count,), generator=g).tolist()
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("memory", [None, "25%"], ids=["resident", "offloaded"])
def test_a_bf16_request_gives_the_same_greedy_tokens_alone_and_among_others(model_folder, memory):
    def engine():
        model, store = open_model(model_folder, "bfloat16", expert_memory=memory)
        return Engine(model, latin, store, max_num_seqs=5, prefill_chunk=16)

    asked = [request(str(i), p) for i, p in enumerate(prompts(9))]
    alone = {}
    for one in asked:
        alone |= run(engine(), [one])[0]
    assert len(set(alone.values())) > 3, "the model says the same whatever it is asked"
    assert run(engine(), asked)[0] == alone
    assert run(engine(), asked, stagger=3)[0] == alone


def test_the_engine_says_what_generate_says(model_folder):
    model, store = open_model(model_folder)
    for prompt in prompts(4):
        expected = model.generate(torch.tensor([prompt]), 24, temperature=0)[0, len(prompt) :]
        stop = (expected == 256).nonzero()
        expected = expected[: int(stop[0])] if len(stop) else expected
        texts, _, _ = run(Engine(model, latin, store), [request("a", prompt)])
        assert texts["a"] == latin(expected.tolist())


def test_a_seed_fixes_a_request_whatever_runs_beside_it(model_folder):
    model, store = open_model(model_folder)
    hot = SamplingParams(temperature=1.0, top_p=0.95)
    asked = [request(str(i), [65, 66, i], sampling=hot, seed=7) for i in range(4)]
    alone = [run(Engine(model, latin, store), [one])[0] for one in asked]
    together = run(Engine(model, latin, store), asked, stagger=2)[0]
    assert {k: v for one in alone for k, v in one.items()} == together
    other = run(Engine(model, latin, store), [request("0", [65, 66, 0], sampling=hot, seed=8)])[0]
    assert other["0"] != together["0"]


def test_stops_at_length_stop_string_and_end_of_text(model_folder):
    model, store = open_model(model_folder)
    whole, reasons, _ = run(Engine(model, latin, store), [request("a", [72, 105])])
    assert reasons["a"] == "length" and len(whole["a"]) == 24
    cut = whole["a"][5:8]
    texts, reasons, _ = run(Engine(model, latin, store), [request("a", [72, 105], stop=(cut,))])
    assert reasons["a"] == "stop" and texts["a"] == whole["a"][: whole["a"].index(cut)]
    model.eos_ids = frozenset({ord(whole["a"][3]) - 0x100})
    texts, reasons, _ = run(Engine(model, latin, store), [request("a", [72, 105])])
    assert reasons["a"] == "stop" and texts["a"] == whole["a"][: whole["a"].index(whole["a"][3])]


def test_cancelling_leaves_the_others_alone(model_folder):
    model, store = open_model(model_folder)
    asked = [request(str(i), p) for i, p in enumerate(prompts(3))]
    expected = run(Engine(model, latin, store), asked)[0]
    engine = Engine(model, latin, store, max_num_seqs=2)
    for one in asked:
        engine.add(one)
    texts = {"0": "", "1": "", "2": ""}
    for step in range(60):
        if step == 4:
            engine.cancel("0")
        for event in engine.step():
            texts[event.request_id] += event.text
    assert not engine.has_work
    assert (texts["1"], texts["2"]) == (expected["1"], expected["2"])
    assert expected["0"].startswith(texts["0"]) and len(texts["0"]) < 24


def test_scores_that_are_not_finite_end_one_request(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store)
    expected = run(Engine(model, latin, store), [request("a", [1, 2])])[0]
    logits = model.decoder.logits

    def with_nan(hidden):
        scores = logits(hidden)
        return torch.cat([scores[:-1], scores[-1:] * float("nan")]) if len(scores) > 1 else scores

    model.decoder.logits = with_nan
    texts, reasons, errors = run(engine, [request("a", [1, 2]), request("b", [3])])
    model.decoder.logits = logits
    assert reasons == {"a": "length", "b": "error"} and "not finite" in str(errors["b"])
    assert texts["a"] == expected["a"]


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_reading_a_prompt_in_chunks_changes_no_token(model_folder, chunk):
    model, store = open_model(model_folder)
    asked = [request(str(i), p) for i, p in enumerate(prompts(4))]
    whole = run(Engine(model, latin, store, prefill_chunk=1000), asked)[0]
    assert run(Engine(model, latin, store, prefill_chunk=chunk), asked)[0] == whole


def test_a_request_queued_and_cancelled_is_counted(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, max_num_seqs=1)
    for name in "abc":
        engine.add(request(name, [1]))
    engine.step()
    for name in "abc":
        engine.cancel(name)
    assert not engine.has_work
    assert engine.metrics.cancelled._value.get() == 3


@pytest.mark.usefixtures("reading_path")
def test_a_read_error_ends_the_requests_of_the_step_and_no_others(model_folder, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    model, store = open_model(model_folder, expert_memory="25%")
    engine = Engine(model, latin, store)
    engine.add(request("a", [1, 2, 3]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        (event,) = engine.step()
    assert event.finish_reason == "error" and "could not be read" in str(event.error)
    assert not engine.has_work
    resident, _ = open_model(model_folder)
    after = run(engine, [request("b", [4, 5])])[0]
    assert after == run(Engine(resident, latin), [request("b", [4, 5])])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [257]}, r"token id 257; ids of this model are in \[0, 257\)"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1] * 250}, "256 tokens, but the prompt has 250 and max_tokens is 24"),
    ],
    ids=["empty", "above", "below", "long"],
)
def test_refuses_what_cannot_be_served(model_folder, options, message):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store)
    with pytest.raises(RequestError, match=message):
        engine.add(request("a", **options))
    assert not engine.has_work


def test_sampling_keeps_what_top_k_and_top_p_allow():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
    g = torch.Generator().manual_seed(0)

    def drawn(**options):
        params = SamplingParams(temperature=1.0, **options)
        return {sample(logits, params, g) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=0.7) == {0, 1}
    frequencies = [
        sum(sample(logits, SamplingParams(temperature=0.7), g) == i for _ in range(4000)) / 4000
        for i in range(4)
    ]
    expected = (logits / 0.7).softmax(-1)
    assert torch.allclose(torch.tensor(frequencies), expected, atol=0.03)
