"""Low-bit copies of missing experts, and their correction by the exact model."""

import json
import time
from dataclasses import replace

import pytest
import torch

from moeyard.cli import main
from moeyard.errors import ConfigError
from moeyard.kernels import waves
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.prices import Measured, Price, read_prices, save_price
from moeyard.moe.models.correction import Correction
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.topk import TopK
from moeyard.serving.engine.expert_metrics import ExpertCollector
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.loading import open_model
from moeyard.serving.planning.lossy import lossy_modes, lossy_sentences

from small_model import write_decoder

CONFIG = ModelConfig(
    vocab_size=257,
    d_model=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_positions=256,
    d_ff=20,
    dense_layers=(1,),
    moe=MoEConfig(num_experts=6, d_expert=32, router=TopK(k=2)),
)
EXPERT_BYTES = 3 * 32 * 32 * 2


def write_model(folder, seed, is_exact_in_int8):
    """Write a bf16 model; if asked for, int8 holds its experts exactly."""
    model = Decoder(CONFIG)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
        if ".experts." in name and is_exact_in_int8:
            whole = torch.randint(-127, 128, parameter.shape, generator=generator).float()
            whole[..., 0] = 127  # the scale of every group is a power of two
            parameter.data = whole / 512
        parameter.data = parameter.data.bfloat16().float()
    write_decoder(folder, model, eos_id=256)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders: bf16, its copies in int8 and int4, and one that int8 holds exactly."""
    root = tmp_path_factory.mktemp("fallback")
    for name, seed, is_exact in (("plain", 5, False), ("whole", 6, True), ("other", 7, False)):
        write_model(root / f"{name}32", seed, is_exact)
        convert(root / f"{name}32", root / name, dtype="bf16")
        convert(root / name, root / f"{name}-int8", dtype="int8")
    convert(root / "plain", root / "plain-int4", dtype="int4")
    return root


def opened(folder, copy, count=4, **options):
    return open_model(
        folder,
        expert_memory=f"{count * EXPERT_BYTES}B",
        options=StoreOptions(fallback=copy, **options),
    )


def prompt(seed, length=9):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def totals(store, *names):
    layers = store.statistics.layers.values()
    return [sum(getattr(layer, name) for layer in layers) for name in names]


def settle(store):
    """Wait until the reads that follow copies have ended."""
    deadline = time.monotonic() + 10
    while store.counts().reading:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def _same_sums(monkeypatch):
    """Let 8 bits and bf16 be added in the same order, by torch."""
    monkeypatch.setattr(waves, "may_use_cpp", lambda _: False)


@pytest.mark.usefixtures("_same_sums")
def test_copies_that_are_exact_give_exact_answers_without_waiting(folders):
    exact, _ = opened(folders / "whole", None)
    model, store = opened(folders / "whole", folders / "whole-int8")
    for rows in (1, 20):
        assert torch.equal(model(prompt(rows, rows)), exact(prompt(rows, rows)))
    expected = exact.generate(prompt(1), 8, temperature=0)
    assert torch.equal(model.generate(prompt(1), 8, temperature=0), expected)
    copied, misses, late = totals(store, "copied", "misses", "prefetch_late")
    assert copied > 0 and misses == late == 0 and store.statistics.stall_s == 0


def test_other_copies_change_answers_and_only_those_of_missing_experts(folders):
    resident, _ = open_model(folders / "plain")
    low, _ = open_model(folders / "plain-int4")
    model, store = opened(folders / "plain", folders / "plain-int4", count=12)
    ids = prompt(3, 60)
    first = model(ids)
    assert not torch.equal(first, resident(ids))
    assert torch.equal(first, low(ids)), "nothing was in memory"
    (copied,) = totals(store, "copied")
    assert copied == 12
    settle(store)
    assert torch.equal(model(ids), resident(ids)), "all experts had been read since"
    assert totals(store, "copied", "misses", "hits") == [12, 0, 12]


def test_counts_tokens_pairs_and_bytes(folders):
    model, store = opened(folders / "plain", folders / "plain-int8", count=12)
    model(prompt(3, 60))
    settle(store)
    pairs, issued = totals(store, "copied_rows", "prefetch_issued")
    assert pairs == 60 * 2 * 2 and issued == 12
    assert store.statistics.copied_tokens == 60
    model(prompt(4, 60))
    assert totals(store, "copied_rows", "bytes_read") == [pairs, 12 * EXPERT_BYTES]
    assert store.statistics.copied_tokens == 60


def test_a_threshold_of_0_waits_for_every_expert(folders):
    resident, _ = open_model(folders / "plain")
    model, store = opened(folders / "plain", folders / "plain-int4", fallback_above=0.0)
    for rows in (1, 20):
        assert torch.equal(model(prompt(rows, rows)), resident(prompt(rows, rows)))
    assert totals(store, "copied") == [0] and totals(store, "misses")[0] > 0


def test_a_threshold_waits_for_experts_with_more_weight(folders):
    model, store = opened(folders / "plain", folders / "plain-int4", count=2, fallback_above=0.5)
    for seed in range(20):
        model(prompt(seed, 1))
    copied, misses, hits, late = totals(store, "copied", "misses", "hits", "prefetch_late")
    assert copied + misses + hits + late == 20 * 2 * 2
    # Of two experts of a row, one has at least half of the weight.
    assert 0 < copied <= 20 * 2 and misses > 0
    all_copied = opened(folders / "plain", folders / "plain-int4", count=2, fallback_above=1.0)
    all_copied[0](prompt(0, 1))
    assert totals(all_copied[1], "copied", "misses") == [4, 0]
    many = opened(folders / "plain", folders / "plain-int4", count=2, fallback_above=1.0)
    many[0](prompt(0, 60))
    assert totals(many[1], "copied") == [0], "many rows share the read of an expert"


@pytest.mark.parametrize("above", [None, 0.45])
@pytest.mark.parametrize("count", [1, 7])
def test_small_caches_stay_consistent(folders, count, above):
    model, store = opened(folders / "plain", folders / "plain-int8", count, fallback_above=above)
    for seed in range(12):
        model(prompt(seed, 1 + seed % 4))
    settle(store)
    counts = store.counts()
    assert counts.resident + counts.free + counts.filling == count
    assert counts.expected <= 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("period", [2, 7])
def test_corrected_answers_are_the_exact_ones(folders, period, temperature):
    resident, _ = open_model(folders / "plain")
    model, store = opened(folders / "plain", folders / "plain-int4", correction=period)
    for seed, length in ((1, 1), (2, 9), (3, 30)):
        drawn = {"temperature": temperature, "seed": seed}
        ids = prompt(seed, length)
        expected = resident.generate(ids, 40, **drawn)
        assert torch.equal(model.generate(ids, 40, **drawn), expected)
    assert totals(store, "copied")[0] > 0
    correction = model.correction
    assert 1 <= correction.mean_advance <= period
    assert torch.equal(model(prompt(9, 20)), resident(prompt(9, 20))), "scores are exact, too"


@pytest.mark.usefixtures("_same_sums")
def test_exact_proposals_are_all_accepted(folders):
    model, _ = opened(folders / "whole", folders / "whole-int8", correction=4)
    model.generate(prompt(1), 1 + 2 * 4, temperature=0)
    assert (model.correction.num_periods, model.correction.mean_advance) == (2, 4.0)


def test_keys_and_values_after_a_correction_are_those_of_the_exact_model(folders, monkeypatch):
    caches = []
    new_cache = Decoder.new_cache

    model, _ = opened(folders / "plain", folders / "plain-int4", correction=6)

    def kept(decoder, *arguments):
        cache = new_cache(decoder, *arguments)
        if decoder is model.decoder:  # and not that of an engine which another test left
            caches.append(cache)
        return cache

    monkeypatch.setattr(Decoder, "new_cache", kept)
    text = model.generate(prompt(2), 25, temperature=0)
    model.correction = None
    model.generate(prompt(2), 25, temperature=0)
    model.generate(text[:, :-1], 1, temperature=0)
    corrected, steps, prefill = caches
    length = text.shape[1] - 1
    assert corrected.length == steps.length == prefill.length == length
    for layer in range(CONFIG.num_layers):
        views = (cache.view(layer, length) for cache in caches)
        for ours, theirs, fresh in zip(*views, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, fresh, rtol=0.05, atol=0.05)  # rounds differently


class Liar:
    """Makes every proposal the token ``said``, by adding to its score."""

    def __init__(self, model, said):
        self.is_lying, self._said = False, said
        logits = model.decoder.logits
        model.decoder.logits = lambda hidden_TD: self._changed(logits(hidden_TD))

    def _changed(self, logits_TV):
        if self.is_lying:
            logits_TV = logits_TV.clone()
            logits_TV[:, self._said] += 1e4
        return logits_TV

    def __enter__(self):
        self.is_lying = True

    def __exit__(self, *_):
        self.is_lying = False


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_only_the_exact_model_ends_an_answer(folders, threshold):
    model, _ = open_model(folders / "plain")
    expected = model.generate(prompt(4), 20, temperature=0)
    assert 256 not in expected
    liar = Liar(model, 256)
    model.correction = Correction(5, lambda: liar, threshold)
    assert torch.equal(model.generate(prompt(4), 20, temperature=0), expected)
    end = int(expected[0, -3])  # the exact model says this one itself
    model.eos_ids = frozenset({end})
    stops = expected[:, : 9 + expected[0, 9:].tolist().index(end) + 1]
    assert torch.equal(model.generate(prompt(4), 20, temperature=0), stops)


def test_a_stop_text_in_a_rejected_tail_does_not_stop(folders):
    model, _ = open_model(folders / "plain")
    ids = prompt(4)[0].tolist()
    expected = "".join(model.stream(ids, 20, temperature=0, ignore_eos=True))
    assert "~" not in expected
    liar = Liar(model, ord("~"))
    model.correction = Correction(5, lambda: liar)
    answer = model.stream(ids, 20, temperature=0, ignore_eos=True, stop="~")
    assert "".join(answer) == expected and answer.finish_reason == "length"


def test_a_threshold_accepts_what_the_exact_model_finds_likely(folders):
    model, _ = open_model(folders / "plain")
    ids = prompt(4)
    expected = model.generate(ids, 20, temperature=0)
    first = int(expected[0, 9])
    following = (model(expected[:, :10])[0, -1].float() / 0.6).softmax(-1)
    said = int(following.argsort(descending=True)[1])  # the second choice after the first token
    liar = Liar(model, said)
    for threshold, token in ((float(following[said]) * 0.99, said), (1.0, int(expected[0, 10]))):
        model.correction = Correction(2, lambda: liar, threshold)
        assert model.generate(ids, 2, temperature=0)[0, 9:].tolist() == [
            first,
            int(expected[0, 10]),
        ]
        assert model.generate(ids, 3, temperature=0)[0, 9:11].tolist() == [first, token]


def test_what_cannot_work_is_refused(folders, tmp_path):
    plain, copy = folders / "plain", folders / "plain-int8"
    cases = [
        (plain, replace(StoreOptions(), fallback=folders / "other-int8"), "is another model than"),
        (plain, StoreOptions(fallback=folders / "plain32"), "whose experts are not quantized"),
        (plain, StoreOptions(fallback_above=0.5), "fallback-above is set without expert-fallback"),
        (plain, StoreOptions(correction=4), "correction is set without expert-fallback"),
        (plain, StoreOptions(fallback=copy, fallback_above=-1.0), "from 0 upwards"),
        (plain, StoreOptions(fallback=copy, correction=1), "from 2 upwards"),
        (plain, StoreOptions(fallback=copy, correction_threshold=0.1), "no expert-correction"),
        (plain, StoreOptions(fallback=copy, correction=4, correction_threshold=1.5), "up to 1"),
        (plain, StoreOptions(fallback=copy, log=tmp_path / "a"), "a log cannot say"),
    ]
    for folder, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            open_model(folder, expert_memory="50%", options=options)
    with pytest.raises(ConfigError, match="all experts are in memory"):
        open_model(plain, options=StoreOptions(fallback=copy))
    model, _ = opened(plain, copy, correction=4)
    with pytest.raises(ConfigError, match="one text at a time"):
        model.generate(prompt(1).repeat(2, 1), 4)
    model, _ = opened(plain, copy, correction=4, correction_threshold=0.1)
    with pytest.raises(ConfigError, match="is for greedy answers"):
        model.generate(prompt(1), 4, temperature=0.5)


def test_each_way_has_a_name_and_exact_ways_have_none(folders):
    plain, copy = ModelFolder(folders / "plain"), folders / "plain-int8"
    names = {
        (): [],
        (("fallback", copy),): ["expert-fallback int8"],
        (("fallback", copy), ("fallback_above", 0.3)): ["expert-fallback int8 above 0.3"],
        (("fallback", copy), ("correction", 8)): [],
    }
    for given, expected in names.items():
        assert lossy_modes(plain, StoreOptions(**dict(given))) == expected
    options = StoreOptions(fallback=copy, correction=8, correction_threshold=0.1)
    (mode,) = lossy_modes(plain, options)
    assert mode == "expert-fallback int8 correction 8 threshold 0.1"
    exact, lossy = (Measured(perplexity=p, expert_bytes=100) for p in (4.0, 4.1))
    save_price(plain.path, Price(mode=mode, text="t", tokens=9, exact=exact, lossy=lossy))
    (sentence,) = lossy_sentences(plain.path, [mode])
    assert "perplexity 4.1 instead of 4 (+2.5%)" in sentence


def price(capsys, *arguments):
    status = main(["price", *map(str, arguments), "--answers", "1", "--tokens", "9"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_price_measures_saves_and_says(folders, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text("".join(chr(97 + n * n % 26) for n in range(400)))
    plain, int4 = folders / "plain", folders / "plain-int4"
    memory = ("--expert-memory", f"{4 * EXPERT_BYTES}B", "--text", text, "--steps", "40")
    status, out, err = price(capsys, plain, *memory, "--expert-fallback", int4, "--json")
    assert status == 0, err
    found = read_prices(plain)["expert-fallback int4"]
    assert json.loads(out) == found.model_dump()
    assert (found.tokens, found.text) == (40, "held_out.txt")
    resident, _ = open_model(plain)
    score = score_text(resident, text.read_text(), limit=40, by_steps=True)
    assert found.exact.perplexity == score.perplexity
    assert found.lossy.perplexity != found.exact.perplexity
    assert found.exact.expert_bytes > 0 and found.lossy.tokens_per_s > 0
    assert lossy_sentences(plain, ["expert-fallback int4"]) == (found.sentence(),)

    status, out, err = price(capsys, int4, "--text", text, "--exact", plain)
    assert status == 0 and "400 tokens" not in err
    stored = read_prices(int4)["int4"]
    assert stored.exact.expert_bytes == EXPERT_BYTES > 2 * stored.lossy.expert_bytes
    assert stored.tokens == 399 and "399 tokens of held_out.txt" in out

    before = read_prices(plain)
    corrected = ("--expert-fallback", int4, "--expert-correction", "4")
    status, out, err = price(capsys, plain, *memory, *corrected, "--json")
    assert status == 0 and "no price is saved" in err
    figures = json.loads(out)
    assert figures["exact"]["perplexity"] == figures["lossy"]["perplexity"]
    assert read_prices(plain) == before


def test_what_has_no_price_is_refused(folders, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text("some words " * 40)
    plain, int4 = folders / "plain", folders / "plain-int4"
    cases = [
        ((plain,), "runs exactly with these options"),
        ((int4,), "name the model it was made from with --exact"),
        ((int4, "--exact", folders / "plain-int8"), "is not what"),
        ((plain, "--exact", plain, "--expert-fallback", int4), "leave exact out"),
        ((int4, "--exact", plain, "--tokens", "1"), "tokens is 1; use a number from 2 upwards"),
    ]
    for given, message in cases:
        status = main(["price", *map(str, given), "--text", str(text)])
        assert status == 2 and message in capsys.readouterr().err
    text.write_text("short")
    assert main(["price", str(int4), "--exact", str(plain), "--text", str(text)]) == 2
    assert "the text has 5 tokens" in capsys.readouterr().err
    assert not (int4 / "prices.json").exists() or "int4" in read_prices(int4)


def test_metrics_count_what_copies_did(folders):
    model, store = opened(folders / "plain", folders / "plain-int4")
    model(prompt(1, 5))
    families = {family.name: family for family in ExpertCollector(CONFIG, store).collect()}
    per_layer = families["moeyard_expert_copied_rows"].samples
    assert sum(sample.value for sample in per_layer) == 5 * 2 * 2
    assert families["moeyard_tokens_with_copies"].samples[0].value == 5
