"""Drafted rows, a small budget of blocks and int8 keys together: still the bits of each alone."""

import random

import pytest
from drafters import draft_counts, use_told
from serving_mixes import Answers, alone, counted, gauges, mixed, random_requests

from moeyard.moe.kv_blocks import bytes_per_block
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.kv_memory import specs_of
from moeyard.serving.loading import open_model

from test_engine import latin


def engine_of(model, kv_dtype, num_blocks=None, speculative="none"):
    budget = None
    if num_blocks is not None:
        budget = f"{num_blocks * bytes_per_block(specs_of(model.decoder), kv_dtype)}B"
    return Engine(
        *(model, latin),
        max_num_seqs=5,
        prefill_chunk=16,
        kv_memory=budget,
        kv_dtype=kv_dtype,
        speculative=speculative,
    )


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_answers_under_pressure_with_drafts_are_those_alone(model_folder, monkeypatch, kv_dtype):
    model, _ = open_model(model_folder, "bfloat16")
    chance = random.Random(5)
    requests = random_requests(chance, 8, most_tokens=24)
    expected = {one.request_id: alone(lambda: engine_of(model, kv_dtype), one) for one in requests}
    known = {
        one.prompt_ids: [score[0] for score in expected[one.request_id][2]][
            len(one.prompt_ids) if one.scores_prompt else 0 :
        ]
        for one in requests
    }
    use_told(monkeypatch, "mixed", known)
    engine = engine_of(model, kv_dtype, num_blocks=9, speculative="told")
    found = mixed(engine, requests, chance)
    for one in requests:
        assert found.of(one.request_id) == expected[one.request_id]
    drafted, accepted = draft_counts(engine)
    assert drafted > accepted > 0 and counted(engine, "preemptions") > 0
    assert set(gauges(engine).values()) == {0}


def test_int8_keys_take_about_half_and_change_scores_a_little(model_folder):
    model, _ = open_model(model_folder, "bfloat16")
    specs = specs_of(model.decoder)
    assert bytes_per_block(specs, "int8") < 0.8 * bytes_per_block(specs)
    (one,) = random_requests(random.Random(1), 1, texts=1)[:1]
    scores = []
    for kv_dtype in (None, "int8"):
        answers = Answers(engine_of(model, kv_dtype))
        answers.add(one)
        scores.append([s[1] for s in answers.finish().of(one.request_id)[2] if s[1] is not None])
    assert scores[0] != scores[1]
    assert scores[0][0] == pytest.approx(scores[1][0], abs=0.05)
