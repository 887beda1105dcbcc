"""Every family of transformers: its folders give its numbers here, and can be written back."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder

from hf_families import CASES, assert_same_model, make, save

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=str)
def opened(request, tmp_path_factory):
    """A transformers model, the folder it saved, and ours opened from it."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save(request.param, folder)
    return theirs, folder, moeyard.load(folder)


def some_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_transformers(opened):
    theirs, _, ours = opened
    ids = some_ids(3, 41)
    expected = theirs(ids).logits
    assert expected.abs().max() > 1
    assert (ours(ids) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_padding_changes_nothing(opened):
    theirs, _, ours = opened
    ids, mask = some_ids(3, 41), torch.ones(3, 41, dtype=torch.long)
    mask[0, :9], mask[1, :30] = 0, 0
    expected = theirs(ids, attention_mask=mask).logits * mask.unsqueeze(-1)
    assert (ours(ids, attention_mask=mask) - expected).abs().max() <= TOLERANCE
    right = mask.flip(1)
    expected = theirs(ids, attention_mask=right).logits * right.unsqueeze(-1)
    assert (ours(ids, attention_mask=right) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_64_greedy_tokens_are_those_of_transformers(opened):
    theirs, _, ours = opened
    ids, mask = some_ids(2, 19, seed=2), torch.ones(2, 19, dtype=torch.long)
    mask[1, :8] = 0
    options = {"max_new_tokens": 64, "attention_mask": mask}
    expected = theirs.generate(ids, do_sample=False, **options)
    assert torch.equal(ours.generate(ids, temperature=0, **options), expected)


@torch.no_grad()
def test_a_cache_in_pieces_gives_the_logits_of_whole_sequences(opened):
    theirs, _, ours = opened
    decoder, ids = ours.decoder, some_ids(2, 30, seed=3)
    expected = theirs(ids).logits
    caches, pieces = [decoder.new_cache(), decoder.new_cache()], []
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 30)):
        batch = batch_of(list(ids[:, start:end]), caches)
        pieces.append(decoder.logits(decoder(batch).hidden_TD).unflatten(0, (2, -1)))
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_what_we_write_opens_in_transformers_with_the_same_logits(opened, tmp_path):
    theirs, folder, _ = opened
    convert(folder, tmp_path / "written")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "written", output_loading_info=True
    )
    assert type(again) is type(theirs)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(again, theirs, some_ids(2, 23))


@torch.no_grad()
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3"])
def test_the_layout_that_transformers_5_has_in_memory_opens_too(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "packed", save_original_format=False)
    assert any(
        name.endswith("experts.gate_up_proj") for name in ModelFolder(tmp_path / "packed").files
    )
    ids = some_ids(2, 23)
    ours = moeyard.load(tmp_path / "packed")
    assert (ours(ids) - theirs(ids).logits).abs().max() <= TOLERANCE
