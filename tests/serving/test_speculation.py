"""Speculation changes no answer, whatever a drafter says: tokens, scores, ends and failures."""

import pytest
import torch
from drafters import KINDS, draft_counts, use_told
from test_confinement import short_of_memory

from moeyard.errors import ConfigError
from moeyard.kernels.cpu import library
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routers.hash import Hash
from moeyard.serving.engine.engine import Engine
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from adapter_folders import everything, write_adapter
from small_model import CONFIG, with_router, write_random_model
from test_engine import GREEDY, latin, prompts, request

HOT = SamplingParams(temperature=1.0, top_p=0.95)
NONE = library.Library(None, "left out")


def asked(adapters=(None,), **options):
    """Return requests that are greedy and sampled, with scores, and end in all ways."""
    ends = [
        {},
        {"stop": (latin([9]), latin([200, 3])), "min_tokens": 4},
        {"stop_token_ids": frozenset(range(0, 256, 11))},
        {"stop_token_ids": frozenset(range(1, 256, 3)), "min_tokens": 9},
        {"max_tokens": 0},
    ]
    found = []
    for index, prompt in enumerate(prompts(8)):
        own = {"num_logprobs": 2, "max_tokens": 14, "seed": index} | ends[index % len(ends)]
        own |= {"sampling": (GREEDY, HOT)[index % 2], "scores_prompt": index in (0, 4)}
        own |= {"adapter": adapters[index % len(adapters)]}
        found.append(request(str(index), prompt, **own | options))
    return found


def outcome(engine, requests, stagger=2):
    """Run requests that come one by one; return all that each has said, and its ids."""
    told = {one.request_id: ["", [], None, None, None, 0] for one in requests}
    waiting, steps = list(requests), 0
    while waiting or engine.has_work:
        if waiting and steps % stagger == 0:
            engine.add(waiting.pop(0))
        steps += 1
        for event in engine.step():
            own = told[event.request_id]
            own[0] += event.text
            own[1] += event.logprobs
            own[2:] = [event.finish_reason, event.stop_token, str(event.error), event.num_tokens]
    assert not engine.has_work and engine.metrics.running._value.get() == 0
    return told


def answers_of(requests, told):
    """Return prompt ids -> answer ids, for drafters that know them."""
    return {
        one.prompt_ids: [score.token for score in told[one.request_id][1]][
            len(one.prompt_ids) if one.scores_prompt else 0 :
        ]
        for one in requests
    }


def check(monkeypatch, kind, engine_with, requests):
    """Compare an engine that runs a drafter's guesses with one that guesses nothing."""
    expected = outcome(engine_with("none"), requests)
    assert {own[2] for own in expected.values()} == {"stop", "length"}
    use_told(monkeypatch, kind, answers_of(requests, expected))
    engine = engine_with("told")
    assert outcome(engine, requests) == expected
    drafted, accepted = draft_counts(engine)
    assert drafted > 30
    assert (accepted == 0) == (kind == "wrong") and (kind != "right" or accepted > drafted * 0.8)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *(("bfloat16", kind) for kind in KINDS),
        ("float32", "mixed"),
        pytest.param("float32", "right", marks=pytest.mark.slow),
        pytest.param("float32", "wrong", marks=pytest.mark.slow),
    ],
)
def test_greedy_and_sampled_answers_in_a_batch_are_those_without(
    model_folder, monkeypatch, dtype, kind
):
    model, _ = open_model(model_folder, dtype)

    def engine(name):
        return Engine(model, latin, None, max_num_seqs=4, prefill_chunk=16, speculative=name)

    check(monkeypatch, kind, engine, asked())


def test_answers_of_offloaded_experts_and_adapters_are_those_without(
    model_folder, tmp_path, monkeypatch
):
    stores = []

    def engine(name):
        model, store = open_model(model_folder, "bfloat16", expert_memory="25%")
        stores.append(store)
        model.adapters.load("a", folder)
        adapters.append(model.adapters.get("a"))
        return Engine(model, latin, store, max_num_seqs=4, prefill_chunk=16, speculative=name)

    adapters, folder = [], write_adapter(tmp_path / "a", everything(CONFIG))
    engine("none")
    check(monkeypatch, "mixed", engine, asked((None, adapters[0])))
    for store in stores:
        store.close()


def test_answers_of_a_router_that_reads_the_token_before_are_those_without(tmp_path, monkeypatch):
    write_random_model(tmp_path / "m", with_router(Hash(k=2, table="bigram")))
    model, store = open_model(tmp_path / "m", expert_memory="50%")

    def engine(name):
        return Engine(model, latin, store, max_num_seqs=4, prefill_chunk=16, speculative=name)

    check(monkeypatch, "mixed", engine, asked())
    store.close()


@pytest.mark.slow
def test_answers_without_the_cpp_kernels_are_those_without_in_bf16(model_folder, monkeypatch):
    monkeypatch.setattr(library, "_loaded", NONE)
    model, _ = open_model(model_folder, "bfloat16")

    def engine(name):
        return Engine(model, latin, None, max_num_seqs=4, prefill_chunk=16, speculative=name)

    check(monkeypatch, "mixed", engine, asked()[:5])


def test_without_the_cpp_kernels_fp32_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr(library, "_loaded", NONE)
    model, _ = open_model(model_folder, "float32")
    with pytest.raises(ConfigError, match="speculative needs the C\\+\\+ kernels in fp32"):
        Engine(model, latin, speculative="ngram")


@pytest.mark.usefixtures("reads_by_parts")
def test_an_expert_that_wrong_guesses_chose_cannot_end_a_request(model_folder, monkeypatch):
    """Reads of an expert that the answers never need fail; guesses choose it all the time."""
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    requests = [request("0", [3], max_tokens=5)]
    resident, _ = open_model(model_folder, "bfloat16")
    engine, needed = Engine(resident, latin), set()
    layers = [index for index, _ in resident.decoder.moe_layers()]

    def see(routings):
        for layer, routing in zip(layers, routings, strict=True):
            needed.update((layer, expert) for expert in routing.experts_TK.unique().tolist())

    engine.metrics.count_routing = see
    for one in requests:
        engine.add(one)
    expected = {}
    while engine.has_work:
        for event in engine.step():
            expected[event.request_id] = expected.get(event.request_id, "") + event.text
    unneeded = {(layer, expert) for layer in layers for expert in range(6)} - needed
    assert unneeded, "the answers need every expert"
    reads, failures = ModelFolder.expert_reads, []

    def read(folder, layer, expert, views, *more):
        def fail():
            failures.append((layer, expert))
            raise OSError(5, "Input/output error")

        return [fail] if (layer, expert) in unneeded else reads(folder, layer, expert, views, *more)

    monkeypatch.setattr(ModelFolder, "expert_reads", read)
    model, store = open_model(model_folder, "bfloat16", expert_memory="50%")
    answers = {
        one.prompt_ids: [ord(c) - 0x100 for c in expected[one.request_id]] for one in requests
    }
    use_told(monkeypatch, "wrong", answers)
    speculating = Engine(model, latin, store, speculative="told")
    found = {name: own[0] for name, own in outcome(speculating, requests, stagger=1).items()}
    assert failures and found == expected
    store.close()


@pytest.mark.parametrize(("method", "most_rows"), [("forward", 17), ("logits", 1)])
def test_guesses_that_are_too_much_for_the_memory_are_left_out(
    model_folder, monkeypatch, method, most_rows
):
    model, _ = open_model(model_folder, "bfloat16")

    def engine(name):
        return Engine(model, latin, None, max_num_seqs=4, prefill_chunk=16, speculative=name)

    requests = asked(scores_prompt=False)[:4]
    expected = outcome(engine("none"), requests)
    use_told(monkeypatch, "right", answers_of(requests, expected))
    with short_of_memory(model, method, most_rows):
        assert outcome(engine("told"), requests) == expected


def test_scores_that_are_not_finite_end_a_request_after_the_tokens_before(
    model_folder, monkeypatch
):
    model, _ = open_model(model_folder, "bfloat16")
    requests = [request("a", [1, 2], num_logprobs=0), request("b", [3], num_logprobs=0)]
    expected = outcome(Engine(model, latin), requests)
    answers = answers_of(requests, expected)
    bad = answers[(1, 2)][9]
    logits, decoder = model.decoder.logits, model.decoder
    whole = type(decoder).forward

    def forward(batch):
        output = whole(decoder, batch)
        output.hidden_TD[(batch.ids_T == bad) & (batch.positions_T > 1)] = torch.nan
        return output

    decoder.forward = forward
    plain = outcome(Engine(model, latin), requests)
    assert plain["a"][2] == "error" and 0 < len(plain["a"][0]) <= 10
    use_told(monkeypatch, "right", answers)
    engine = Engine(model, latin, speculative="told")
    assert outcome(engine, requests) == plain and draft_counts(engine)[1] > 5
    assert model.decoder.logits == logits


def test_the_store_hears_of_each_text_once_with_all_its_rows(model_folder, monkeypatch):
    heard, begin = [], ExpertStore.begin

    def see(self, forward):
        heard.append(forward)
        begin(self, forward)

    monkeypatch.setattr(ExpertStore, "begin", see)
    model, store = open_model(model_folder, expert_memory="50%")
    requests = [request(str(i), prompt, num_logprobs=0) for i, prompt in enumerate(prompts(3))]
    expected = outcome(Engine(model, latin, store), requests, stagger=1)
    heard.clear()
    use_told(monkeypatch, "right", answers_of(requests, expected))
    engine = Engine(model, latin, store, speculative="told")
    assert outcome(engine, requests, stagger=1) == expected
    texts = {sequence for forward in heard for sequence in forward.sequences}
    assert len(texts) == len(requests)
    assert all(len(set(forward.sequences)) == len(forward.sequences) for forward in heard)
    assert max(max(forward.lengths) for forward in heard if len(forward.sequences) == 3) > 1
    answered = sum(own[5] for own in expected.values())
    drafted, accepted = draft_counts(engine)
    rows = sum(sum(forward.lengths) for forward in heard)
    prompt_rows = sum(len(one.prompt_ids) for one in requests)
    assert rows == prompt_rows + answered - len(requests) + drafted - accepted
    store.close()


def test_names_that_are_unknown_and_options_that_do_not_fit_are_refused(model_folder):
    model, _ = open_model(model_folder)
    with pytest.raises(ConfigError, match="'medusa'; use one of none, ngram, suffix"):
        Engine(model, latin, speculative="medusa")
