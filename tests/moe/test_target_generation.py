"""Targets are those of transformers' generate; a mask leaves tokens out."""

import itertools

import pytest
import torch
import transformers

from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of
from moeyard.moe.config.encoder_decoder import EncoderDecoderConfig
from moeyard.moe.folders.source_texts import SourceTexts
from moeyard.moe.models.encoder_decoder import EncoderDecoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.target_generation import TargetLimits, write_targets

from pairs import ENCODER_DECODER
from seq2seq_models import SOURCES, ours, padded, save, texts

SMALL = {name: value for name, value in ENCODER_DECODER.items() if name != "kind"}
EOS = 1
ENDS = range(1, 50, 4)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "model"
    theirs = save("t5_gated", path)
    return ours(path).eval(), theirs


def small(vocab_size=6):
    config = EncoderDecoderConfig(**SMALL, vocab_size=vocab_size, start_id=0)
    model = EncoderDecoder(config).eval()
    initialize(model, 5)
    return model


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_targets_and_scores_are_those_of_transformers(both, beams, penalty):
    model, theirs = both
    sources = texts(SOURCES)
    limits = TargetLimits(9, beams, penalty, ENDS)
    found = write_targets(model, [row.tolist() for row in sources], limits)
    ids, mask = padded(sources)
    wanted = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = iter(wanted.sequences[:, 1:].tolist())
    for targets in found:
        assert len(targets) == beams
        for written in targets:
            row = next(rows)
            end = next((n for n, one in enumerate(row) if one in limits.eos_ids), 9)
            assert written.ids == row[:end] and written.is_ended == (end < 9)
    assert any(written.is_ended for targets in found for written in targets)
    if beams > 1:
        scores = torch.tensor([written.score for targets in found for written in targets])
        torch.testing.assert_close(scores, wanted.sequences_scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_enough_beams_find_the_likeliest_target_of_all():
    model, source = small(4), torch.tensor([2, 3, 1])
    hidden = model.encode(batch_of([source])).hidden_TD
    every = []
    for length in (1, 2, 3):
        for ids in itertools.product([0, 2, 3], repeat=length):
            ends = [*ids, EOS] if length < 3 else list(ids)
            rows = batch_of([torch.tensor([0, *ends[:-1]])])
            logits = model.logits(model.decode(rows, hidden, (3,)).hidden_TD)
            nats = logits.log_softmax(dim=-1)[range(len(ends)), ends].sum()
            every.append((float(nats) / len(ends), list(ids)))
    limits = TargetLimits(3, 40, 1.0, {EOS})
    best = write_targets(model, [source.tolist()], limits)[0]
    found = next(written for written in best if written.ids)
    score, ids = max(every)
    assert found.ids == ids and found.score == pytest.approx(score, abs=1e-5)


def test_a_mask_leaves_tokens_out_and_changes_no_score():
    model, seen = small(), []

    def only_even(nats_BV, targets):
        seen.append([list(ids) for ids in targets])
        masked = nats_BV.clone()
        masked[:, 3::2] = -torch.inf
        return masked

    limits = TargetLimits(5, 3, 0.0, {EOS})
    found = write_targets(model, [[2, 3, 1], [4, 1]], limits, only_even)
    assert all(one % 2 == 0 for targets in found for written in targets for one in written.ids)
    assert seen[0] == [[]] * 6 and {len(ids) for ids in seen[2]} == {2}
    written = next(w for w in found[0] if w.ids)
    ends = written.ids + [EOS] * written.is_ended
    with torch.no_grad():
        hidden = model.encode(batch_of([torch.tensor([2, 3, 1])])).hidden_TD
        rows = batch_of([torch.tensor([0, *ends[:-1]])])
        nats = model.logits(model.decode(rows, hidden, (3,)).hidden_TD).log_softmax(dim=-1)
    assert written.score == pytest.approx(float(nats[range(len(ends)), ends].sum()), abs=1e-5)

    def nothing_after_one(nats_BV, targets):
        return nats_BV if not targets[0] else torch.full_like(nats_BV, -torch.inf)

    never = TargetLimits(5, 3, 0.0, frozenset())
    assert write_targets(model, [[2, 1]], never, nothing_after_one) == [[]]


def test_sources_have_the_ids_that_transformers_gives_them(tmp_path):
    signs = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581the", -3.0)]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    transformers.T5Tokenizer(vocab=signs + letters, extra_ids=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    codec, some = SourceTexts(tmp_path), ["the sea is red", "the"]
    for length in (4, 50):
        wanted = reference(some, truncation=True, max_length=length)["input_ids"]
        assert codec.encode_sources(some, length) == [(wanted[0], length == 4), (wanted[1], False)]
    assert codec.decode(wanted[0]) == some[0] and codec.end_id == wanted[0][-1] == 1


def test_sources_together_are_written_as_alone(both):
    model, _ = both
    sources = [row.tolist() for row in texts(SOURCES, 4)]
    limits = TargetLimits(8, 3, 1.0, {EOS})
    together = write_targets(model, sources, limits)
    for source, found in zip(sources, together, strict=True):
        (alone,) = write_targets(model, [source], limits)
        assert [one.ids for one in alone] == [one.ids for one in found]
    assert write_targets(model, [], limits) == []


@pytest.mark.parametrize(
    ("sources", "limits", "message"),
    [
        ([[]], {}, "source 0 has 0 tokens; give 1 to 48"),
        ([[2], [2] * 49], {}, "source 1 has 49 tokens; give 1 to 48"),
        ([[6]], {}, "source 0 has the id 6; use ids from 0 to 5"),
        ([[2]], {"max_new_tokens": 49}, "max_new_tokens is 49, but the model has positions for 48"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens is 0; use a whole number from 1"),
        ([[2]], {"beams": 1.5}, "beams is 1.5; use a whole number from 1"),
    ],
)
def test_what_cannot_be_written_is_refused(sources, limits, message):
    with pytest.raises(ConfigError, match=message):
        write_targets(small(), sources, TargetLimits(**{"max_new_tokens": 3} | limits))


def test_routers_that_need_later_tokens_cannot_write():
    moe = ENCODER_DECODER["moe"] | {"router": {"kind": "expert_choice", "evaluation": "group"}}
    config = EncoderDecoderConfig(**SMALL | {"moe": moe}, vocab_size=6, start_id=0)
    with pytest.raises(ConfigError, match="cannot continue a text"):
        write_targets(EncoderDecoder(config).eval(), [[2]], TargetLimits(3))
