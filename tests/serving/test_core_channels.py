"""Core channels: what a prompt used most is what its answer uses, whatever else the server does."""

import random

import pytest
import torch
from serving_mixes import HOT, Answers, alone, counted, mixed, random_requests

from moeyard.cli import main
from moeyard.errors import ConfigError
from moeyard.kernels.values.activation import gated
from moeyard.moe.batch import batch_of
from moeyard.moe.experts.core_channels import FEWEST_ROWS, TOKEN_SHARE
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.prices import read_prices
from moeyard.moe.kv_blocks import bytes_per_block
from moeyard.moe.routers.top_p import TopP
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.kv_memory import specs_of
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.evaluation.lm_eval_bridge import run_tasks
from moeyard.serving.evaluation.measure_sparsity import observing
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.loading import load, open_model
from moeyard.serving.planning.lossy import lossy_modes, lossy_sentences

from adapter_folders import everything, write_adapter
from small_model import CONFIG, slots, with_router, write_random_model
from test_engine import latin, request

HALF = "coreinfer:0.5"
PROMPT = list(range(40, 90))
SHORT = PROMPT[:14]
"""Some experts have too few of its rows for a core."""


def opened(folder, target=HALF, **options):
    return open_model(folder, "bfloat16", options=StoreOptions(sparsity=target), **options)


def all_used(core, decoder):
    """Return the channels that an answer uses, by layer."""
    return {i: core._layers[layer.experts].used_EF for i, layer in decoder.moe_layers()}


class Reference:
    """The cores of one prompt, by plain sorting, from the rows of a model in fp32."""

    def __init__(self):
        self.rows, self.core = {}, {}

    def see(self, layer, expert, experts, x_nD, h_nH):
        act_nF = gated(h_nH, experts.activation).abs()
        self.rows[layer, expert] = len(act_nF)
        width = act_nF.shape[1]
        counts, peaks = [0] * width, [0.0] * width
        for act_F in act_nF.tolist():
            largest = sorted(act_F, reverse=True)[round(TOKEN_SHARE * width) - 1]
            for channel, size in enumerate(act_F):
                counts[channel] += size >= largest
                peaks[channel] = max(peaks[channel], size)
        order = sorted(range(width), key=lambda c: (-counts[c], -peaks[c], c))
        self.core[layer, expert] = set(order[: width // 2])


@torch.inference_mode()
def read(decoder, pieces):
    """Read a prompt in pieces and return its core channels."""
    core, cache = decoder.new_core(sum(map(len, pieces))), decoder.new_cache()
    for ids in pieces:
        decoder(batch_of([torch.tensor(ids)], [cache], cores=[core]))
    return core


def test_the_core_is_that_of_a_plain_reference(model_folder):
    exact, reference = load(model_folder), Reference()
    with observing(exact, reference):
        exact(torch.tensor([SHORT]))
    decoder = load(model_folder, expert_sparsity=HALF).decoder
    used = all_used(read(decoder, [SHORT]), decoder)
    sizes = set()
    for (layer, expert), core in reference.core.items():
        if reference.rows[layer, expert] < FEWEST_ROWS:
            core = set(range(20))
        assert set(used[layer][expert].nonzero().flatten().tolist()) == core
        sizes.add(len(core))
    assert sizes == {10, 20}
    visited = {(layer, expert) for layer, expert in reference.core}
    others = [(i, e) for i, _ in decoder.moe_layers() for e in range(6) if (i, e) not in visited]
    assert all(used[layer][expert].all() for layer, expert in others)


def test_the_core_depends_on_no_pieces_and_no_repeats(model_folder):
    decoder = opened(model_folder)[0].decoder
    whole = all_used(read(decoder, [PROMPT]), decoder)
    for cuts in ((1, 2, 30), (17,), (49,)):
        pieces = [PROMPT[a:b] for a, b in zip((0, *cuts), (*cuts, 50), strict=True)]
        core = read(decoder, pieces)
        with torch.inference_mode():  # the text is read again, as after it has lost its blocks
            decoder(batch_of([torch.tensor(PROMPT)], [decoder.new_cache()], cores=[core]))
        again = all_used(core, decoder)
        assert all(torch.equal(again[layer], whole[layer]) for layer in whole)


@pytest.mark.parametrize("memory", [None, 3])
def test_with_all_channels_answers_are_the_exact_models(model_folder, memory):
    size = None if memory is None else slots(memory, "bfloat16")
    exact = load(model_folder, "bfloat16")
    other = load(model_folder, "bfloat16", expert_memory=size, expert_sparsity="coreinfer:0")
    ids_BT = torch.tensor([PROMPT, PROMPT[::-1]])
    assert torch.equal(other.generate(ids_BT, 20, 0), exact.generate(ids_BT, 20, 0))
    text = "".join(map(chr, PROMPT * 4))
    assert score_text(other, text, 64) == score_text(exact, text, 64, second_halves=True)


@pytest.mark.parametrize("memory", [None, 3])
def test_generation_is_the_engines_and_lossy(model_folder, memory):
    size = None if memory is None else slots(memory, "bfloat16")
    model, store = opened(model_folder, expert_memory=size)
    text = alone(lambda: Engine(model, latin, store, prefill_chunk=16), request("a", PROMPT))[0]
    rows = model.generate(torch.tensor([PROMPT, PROMPT[::-1]]), 24, 0)
    assert latin(rows[0, 50:].tolist())[: len(text)] == text
    assert 0.4 < model.decoder.core.share_used < 1
    exact = load(model_folder, "bfloat16")
    assert not torch.equal(exact.generate(torch.tensor([PROMPT]), 24, 0)[0], rows[0])


def blocks(model, count):
    """Return the budget of ``count`` blocks."""
    return f"{count * bytes_per_block(specs_of(model.decoder))}B"


def test_an_answer_does_not_depend_on_the_others(model_folder):
    """Two share a prompt, and together they outgrow the memory, so one loses its blocks."""
    model, store = opened(model_folder)

    def engine(**options):
        return Engine(model, latin, store, prefill_chunk=16, **options)

    shared = {"group": "g", "num_logprobs": 1, "max_tokens": 20}
    asked = [request("a", SHORT, **shared), request("b", SHORT, sampling=HOT, seed=1, **shared)]
    asked.append(request("c", PROMPT[20:35], priority=1, num_logprobs=1, max_tokens=20))
    pressed = engine(max_num_seqs=3, kv_memory=blocks(model, 6))
    found = Answers(pressed)
    found.add(*asked)
    found.finish()
    for one in asked:
        assert found.of(one.request_id) == alone(engine, one), one.request_id
    assert counted(pressed, "preemptions") > 0 and set(found.cached.values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("speculative", ["none", "ngram"])
def test_so_it_is_in_random_mixes(model_folder, speculative):
    model, store = opened(model_folder)

    def engine(**options):
        return Engine(model, latin, store, prefill_chunk=16, **options)

    asked = random_requests(random.Random(5), 9, longest=60)
    pressed = engine(max_num_seqs=6, kv_memory=blocks(model, 9), speculative=speculative)
    found = mixed(pressed, asked, random.Random(1))
    for one in asked:
        assert found.of(one.request_id) == alone(engine, one), one.request_id
    assert counted(pressed, "preemptions") > 0 and set(found.cached.values()) == {0}


def test_an_answer_survives_steps_that_fail(model_folder, monkeypatch):
    """The rows of a repeated step are counted once."""
    size = slots(3, "bfloat16")
    model, store = opened(model_folder, expert_memory=size)
    one = request("a", PROMPT, num_logprobs=1)
    expected = alone(lambda: Engine(model, latin, store, prefill_chunk=16), one)
    engine = Engine(model, latin, store, prefill_chunk=16)
    decoder, failures = model.decoder, []
    second = decoder.moe_layers()[1][1].experts

    def fail_once(*given):
        if len(given[0]) == 16 and len(failures) < 2:  # of both; each alone has 8
            failures.append(given)
            raise MemoryError
        return run(*given)

    run = second.by_channel
    monkeypatch.setattr(second, "by_channel", fail_once)
    found = Answers(engine)
    found.add(one, request("b", PROMPT[:30]))
    assert found.finish().of("a") == expected and len(failures) == 2


def test_the_text_is_scored_by_second_halves(model_folder):
    """As an answer to the first half would be."""
    model = load(model_folder, expert_sparsity=HALF)
    ids = [n * n % 127 for n in range(33)]
    score = score_text(model, model.tokenizer.decode(ids), 32)
    assert score.tokens == 16
    core, cache = model.decoder.new_core(16), model.decoder.new_cache()
    loss = 0.0
    with torch.inference_mode():
        for piece in (ids[:16], *([token] for token in ids[16:32])):
            rows = batch_of([torch.tensor(piece)], [cache], cores=[core])
            hidden_TD = model.decoder(rows).hidden_TD
            if len(piece) == 1:
                logits_V = model.decoder.logits(hidden_TD)[-1]
                loss -= float(logits_V.log_softmax(0)[ids[cache.length]])
    assert score.loss == pytest.approx(loss / 16, rel=1e-5)


def test_it_is_named_with_its_price(model_folder, tmp_path, capsys):
    write_random_model(tmp_path / "model")
    text = tmp_path / "text"
    text.write_text("".join(chr(97 + n * n % 26) for n in range(900)))
    given = [str(tmp_path / "model"), "--text", str(text), "--length", "128"]
    assert main(["eval", *given, "--expert-sparsity", HALF]) == 0
    said = capsys.readouterr()
    assert "second half is predicted" in said.err and "its price is not known" in said.err
    few = ["--answers", "1", "--tokens", "5"]
    assert main(["price", *given, *few, "--expert-sparsity", HALF]) == 0
    files = ModelFolder(tmp_path / "model")
    (mode,) = lossy_modes(files, StoreOptions(sparsity=HALF))
    price = read_prices(files.path)[mode]
    assert mode == "expert-sparsity coreinfer 0.5" and price.tokens == 64 * 7 + 2
    assert 0.4 < price.lossy.expert_bytes / price.exact.expert_bytes < 1
    assert price.lossy.perplexity != price.exact.perplexity
    (sentence,) = lossy_sentences(files.path, [mode])
    assert "perplexity" in sentence and "no prefixes are reused" in sentence


def test_what_it_does_not_go_with_is_one_sentence(model_folder, tmp_path):
    for wrong in ("coreinfer:1", "coreinfer:-0.1", "coreinfer:", "coreinfer:half"):
        with pytest.raises(ConfigError, match="share of channels that answers leave out"):
            load(model_folder, expert_sparsity=wrong)
    write_random_model(tmp_path / "top_p", with_router(TopP()))
    with pytest.raises(ConfigError, match="router top_p does not choose k experts"):
        load(tmp_path / "top_p", expert_sparsity=HALF)
    wide = CONFIG.moe.model_copy(update={"d_expert": 32})
    write_random_model(tmp_path / "wide", CONFIG.model_copy(update={"d_model": 32, "moe": wide}))
    convert(tmp_path / "wide", tmp_path / "int8", dtype="int8")
    with pytest.raises(ConfigError, match="experts of 8 or 4 bits"):
        load(tmp_path / "int8", expert_sparsity=HALF)
    both = {"expert_sparsity": HALF, "expert_memory": "25%"}
    with pytest.raises(ConfigError, match="copies of expert-fallback have no channels"):
        load(tmp_path / "wide", **both, expert_fallback=tmp_path / "int8")
    model = load(model_folder, expert_sparsity=HALF)
    with pytest.raises(ConfigError, match="updates experts, but answers use core channels"):
        model.adapters.load("a", write_adapter(tmp_path / "a", everything(CONFIG)))
    with pytest.raises(ConfigError, match="only answers leave channels out"):
        run_tasks(model, ["any"], None, None)
