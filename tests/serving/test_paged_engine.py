"""Blocks, preemption, shared prompts and reuse change no bit of an answer."""

import random

import pytest
import torch
from serving_mixes import HOT, Answers, alone, counted, gauges, random_requests

from moeyard.errors import ConfigError, RequestError
from moeyard.moe.kv_blocks import bytes_per_block
from moeyard.moe.routers.hash import Hash
from moeyard.serving.engine import engine as engine_module
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.kv_memory import specs_of
from moeyard.serving.loading import open_model

from adapter_folders import everything, write_adapter
from small_model import CONFIG, with_router, write_random_model
from test_engine import latin, request


def blocks(model, count):
    """Return the budget of ``count`` blocks."""
    return f"{count * bytes_per_block(specs_of(model.decoder))}B"


def check_pressure(model, store):
    """Compare requests that press each other with each of them alone.

    The second takes over what the first has read. The others outgrow the budget together, so the
    last one loses its blocks.
    """
    shared, short = range(100, 140), range(100, 115)
    more = {"num_logprobs": 2, "seed": 1}
    hot = {"sampling": HOT, "max_tokens": 20}
    asked = [
        request("first", shared, max_tokens=3, **more),
        request("second", shared[:36], max_tokens=3, **more),
        request("third", short, max_tokens=20, group="g", **more),
        request("fourth", short, group="g", **{**more, **hot, "seed": 2}),
        request("last", [9] * 15, priority=1, **{**more, **hot}),
    ]
    engine = Engine(
        model, latin, store, max_num_seqs=5, prefill_chunk=16, kv_memory=blocks(model, 6)
    )
    answers = Answers(engine)
    answers.add(asked[0])
    while "first" not in answers.texts:
        answers.step()
    answers.add(*asked[1:])
    answers.finish()
    for one in asked:
        expected = alone(lambda: Engine(model, latin, store, prefill_chunk=16), one)
        assert answers.of(one.request_id) == expected
    assert set(gauges(engine).values()) == {0}
    assert answers.cached["second"] == 32 and counted(engine, "preemptions") > 0


@pytest.mark.parametrize(
    ("dtype", "memory"),
    [("bfloat16", None), ("float32", None), ("bfloat16", "25%")],
    ids=["bf16", "fp32", "offloaded"],
)
def test_an_answer_has_the_bits_that_it_has_alone(model_folder, dtype, memory):
    check_pressure(*open_model(model_folder, dtype, expert_memory=memory))


def test_so_it_has_where_only_whole_chunks_of_prompts_are_exact(model_folder, monkeypatch):
    monkeypatch.setattr(engine_module, "rows_are_exact", lambda decoder: False)
    check_pressure(*open_model(model_folder, "bfloat16"))


def test_a_prefix_is_taken_over_with_its_bits_and_counted(model_folder):
    model, store = open_model(model_folder)
    prompt = list(range(60))
    asked = [
        request("a", prompt, num_logprobs=1, max_tokens=6),
        request("b", [*prompt, 5], num_logprobs=1, max_tokens=6),
    ]

    def answers(**options):
        found = Answers(Engine(model, latin, store, prefill_chunk=16, **options))
        for one in asked:
            found.add(one)
            found.finish()
        return found

    reused, whole = answers(), answers(reuses_prefixes=False)
    assert (reused.cached["a"], reused.cached["b"]) == (0, 48)
    assert set(whole.cached.values()) == {0}
    assert reused.of("b") == whole.of("b")
    assert counted(reused.engine, "prefix_cache_hits") == 48
    assert counted(reused.engine, "prefix_cache_queries") == 60 + 61
    assert counted(whole.engine, "prefix_cache_queries") == 0


def test_other_salts_and_scores_of_prompts_take_nothing_over(model_folder):
    model, store = open_model(model_folder)
    found = Answers(Engine(model, latin, store, prefill_chunk=16))
    prompt = list(range(60))
    options = [{"cache_salt": "x"}, {"cache_salt": "y"}, {}, {"scores_prompt": True}]
    for index, given in enumerate(options):
        found.add(request(str(index), prompt, num_logprobs=0, max_tokens=2, **given))
        found.finish()
    assert set(found.cached.values()) == {0}
    assert len(found.scores["3"]) == 60 + 2
    found.add(request("again", prompt, cache_salt="y"))
    assert found.finish().cached["again"] == 48


def test_without_shared_prompts_each_answer_reads_its_own(model_folder):
    """As while routes are recorded."""
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, reuses_prefixes=False, shares_prompts=False)
    rows = []
    engine.metrics.count_routing = lambda routings: rows.append(len(routings[0].experts_TK))
    found = Answers(engine)
    found.add(*(request(str(n), range(37), group="g", max_tokens=2) for n in range(3)))
    found.finish()
    assert sum(rows) == 3 * 38


def test_an_adapter_takes_over_what_it_has_read_itself(model_folder, tmp_path):
    model, store = open_model(model_folder)
    folder = write_adapter(tmp_path / "a", everything(CONFIG))
    model.adapters.load("a", folder)
    adapter, prompt = model.adapters.get("a"), list(range(60))
    found = Answers(Engine(model, latin, store, prefill_chunk=16))
    options = {"num_logprobs": 1, "max_tokens": 4}
    asked = [
        request("plain", prompt, **options),
        request("first", prompt, adapter=adapter, **options),
        request("second", [*prompt, 7], adapter=adapter, **options),
    ]
    for one in asked:
        found.add(one)
        found.finish()
        expected = alone(lambda: Engine(model, latin, store, prefill_chunk=16), one)
        assert found.of(one.request_id) == expected
    assert found.cached == {"plain": 0, "first": 0, "second": 48}
    model.adapters.load("again", folder)
    found.add(request("again", prompt, adapter=model.adapters.get("again"), **options))
    assert found.finish().cached["again"] == 0


def test_several_answers_read_their_prompt_once(model_folder):
    model, store = open_model(model_folder)
    prompt = tuple(range(37))
    asked = [
        request(
            str(n),
            prompt,
            seed=n,
            sampling=HOT,
            max_tokens=8,
            group="g",
            num_logprobs=1,
            scores_prompt=True,
        )
        for n in range(3)
    ]
    engine = Engine(model, latin, store, prefill_chunk=16, reuses_prefixes=False)
    rows = []
    forward = model.decoder.forward
    model.decoder.forward = lambda batch: rows.append(batch.lengths) or forward(batch)
    found = Answers(engine)
    found.add(*asked)
    found.finish()
    model.decoder.forward = forward
    assert sum(map(sum, rows)) == 37 + 3 * 7, "each answer reads all its tokens but the last"
    for one in asked:
        expected = alone(lambda: Engine(model, latin, store, prefill_chunk=16), one)
        assert found.of(one.request_id) == expected
    assert len({found.texts[one.request_id] for one in asked}) > 1


def test_a_budget_for_one_request_answers_all_of_them_one_after_the_other(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, max_num_seqs=8, kv_memory=blocks(model, 4))
    assert engine.max_model_len == 64
    found = Answers(engine)
    asked = [request(str(n), [n] * 40, max_tokens=12) for n in range(3)]
    found.add(*asked)
    most = 0
    while engine.has_work:
        found.step()
        most = max(most, engine._pool.num_used)
    assert most == 4 and len(found.reasons) == 3
    assert set(gauges(engine).values()) == {0}


def test_what_the_budget_can_never_hold_is_one_sentence(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, kv_memory=blocks(model, 4))
    with pytest.raises(RequestError, match="64 tokens, which is what kv-memory holds") as error:
        engine.add(request("a", [1] * 41))
    assert error.value.code == "context_length_exceeded" and not engine.has_work
    engine.add(request("b", [1] * 40))
    for budget, message in (("10B", r"kv-memory is 10 bytes, but one block of 16"), ("x", "size")):
        with pytest.raises(ConfigError, match=message):
            Engine(model, latin, store, kv_memory=budget)


def test_a_full_batch_of_the_longest_texts_waits_for_no_block(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, max_num_seqs=3, max_model_len=48)
    found = Answers(engine)
    found.add(*(request(str(n), [n] * 40, max_tokens=8) for n in range(3)))
    found.finish()
    assert counted(engine, "preemptions") == 0
    assert Engine(model, latin, store, kv_memory="100%")._pool.num_blocks == 8 * 17


def test_cancelling_frees_everything_at_once(model_folder):
    model, store = open_model(model_folder)
    engine = Engine(
        model, latin, store, max_num_seqs=3, prefill_chunk=16, kv_memory=blocks(model, 9)
    )
    chance = random.Random(3)
    for one in random_requests(chance, 7):
        engine.add(one)
        for _ in range(chance.choice([0, 1, 2])):
            engine.step()
    names = list(engine._sequences)
    assert len(names) > 4
    for name in chance.sample(names, len(names)):
        engine.cancel(name)
        engine.cancel(name)
    assert not engine.has_work and set(gauges(engine).values()) == {0}
    assert engine._pool.num_available == 9
    after = Answers(engine)
    after.add(request("after", [1, 2, 3]))
    assert len(after.finish().texts["after"]) == 24


def test_a_failure_frees_its_blocks_and_answers_that_waited_go_on(model_folder, monkeypatch):
    """The first of three answers to one prompt fails while it reads; the next one reads anew."""
    model, store = open_model(model_folder)
    engine = Engine(model, latin, store, prefill_chunk=16)
    for n in range(3):
        engine.add(request(str(n), range(40), group="g"))
    forward, calls = model.decoder.forward, []

    def fail_once(batch):
        calls.append(batch.lengths)
        if len(calls) == 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return forward(batch)

    model.decoder.forward = fail_once
    ended = {}
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason:
                ended[event.request_id] = event.finish_reason
    model.decoder.forward = forward
    assert ended == {"0": "error", "1": "length", "2": "length"}
    assert set(gauges(engine).values()) == {0}


def test_routers_that_read_the_id_before_a_row_know_it_after_a_prefix(tmp_path):
    write_random_model(tmp_path / "m", with_router(Hash(k=2, table="bigram")))
    check_pressure(*open_model(tmp_path / "m"))
