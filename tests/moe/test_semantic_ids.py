"""Semantic ids: clusters of equal size, codes of embeddings, tables of items, valid prefixes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeyard.cli import main as command
from moeyard.errors import ConfigError, DataError
from moeyard.moe.items import balanced_kmeans as kmeans
from moeyard.moe.items.balanced_kmeans import balanced_kmeans
from moeyard.moe.items.semantic_ids import fit_codebooks, read_codebooks
from moeyard.moe.items.table import ItemTable, open_table, read_table
from moeyard.moe.items.trie import Trie


def points(count, width=5, seed=0):
    """Three dense spots and a tail, so that k-means alone would give unequal clusters."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, width, generator=draws) * 4
    spots = torch.randint(3, (count,), generator=draws) * (torch.arange(count) % 5 > 0)
    return centres[spots] + torch.randn(count, width, generator=draws) * 0.3


@pytest.mark.parametrize("most", [0, 1024], ids=["in_turn", "exact"])
@pytest.mark.parametrize(("count", "clusters"), [(53, 7), (40, 8), (9, 9), (11, 1)])
def test_sizes_of_clusters_differ_by_at_most_one(monkeypatch, most, count, clusters):
    monkeypatch.setattr(kmeans, "EXACT_POINTS", most)
    x_ND = points(count)
    found = balanced_kmeans(x_ND, clusters, seed=3)
    sizes = torch.bincount(found.clusters_N, minlength=clusters)
    assert int(sizes.sum()) == count and int(sizes.max() - sizes.min()) <= 1
    for cluster in range(clusters):
        own = x_ND[found.clusters_N == cluster].mean(dim=0)
        torch.testing.assert_close(found.centroids_KD[cluster], own)
    assert torch.equal(balanced_kmeans(x_ND, clusters, seed=3).clusters_N, found.clusters_N)


def test_exact_rounds_are_better_than_clusters_that_choose_in_turn(monkeypatch):
    x_ND = points(120)

    def distance(most):
        monkeypatch.setattr(kmeans, "EXACT_POINTS", most)
        found = balanced_kmeans(x_ND, 8, seed=0)
        return float((x_ND - found.centroids_KD[found.clusters_N]).square().sum())

    assert distance(1024) < distance(0)


def test_codes_are_the_nearest_centroids_of_what_is_left():
    books, codes_NL = fit_codebooks(points(90), num_levels=3, num_codes=6, seed=0)
    new_ND = points(40, seed=9)
    rest_ND, found_NL = new_ND, books.encode(new_ND)
    for level, book_KD in enumerate(books.codebooks_LKD):
        nearest_N = torch.cdist(rest_ND.double(), book_KD.double()).argmin(dim=1)
        assert torch.equal(found_NL[:, level], nearest_N)
        rest_ND = rest_ND - book_KD[nearest_N]
    torch.testing.assert_close(new_ND - books.decode(found_NL), rest_ND)
    # What codes stand for has these codes, unless another centroid is as near.
    assert torch.equal(books.encode(books.decode(codes_NL))[:, 0].unique(), torch.arange(6))
    for level in range(3):
        sizes = torch.bincount(codes_NL[:, level], minlength=6)
        assert int(sizes.max() - sizes.min()) <= 1


def test_more_codes_than_items_are_refused():
    with pytest.raises(ConfigError, match="there are 5 items for 6 codes on each level; give"):
        fit_codebooks(points(5), 2, 6, seed=0)


def test_a_table_comes_back_from_its_text_and_gives_tokens():
    table = ItemTable(["b", "ä", "7"], torch.tensor([[0, 2], [1, 2], [1, 0]]), 3)
    again = read_table(table.text(), "x")
    assert again.names == table.names and torch.equal(again.codes_NL, table.codes_NL)
    assert (again.vocabulary, again.begin) == (7, 6)
    assert again.tokens(torch.tensor([[1, 2]])).tolist() == [[[1, 5], [1, 3]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "x is not a table of items; give one that moeyard items wrote"),
        ('{"codes": 2, "items": {}}', "x is not a table of items"),
        ('{"codes": 2, "items": {"a": [0], "a": [1]}}', "x is not a table of items"),
        ('{"codes": 2, "items": {"a": [0, 2]}}', "the item 'a' the codes .0, 2.; each item"),
        ('{"codes": 2, "items": {"a": [0], "b": [0, 1]}}', "the item 'b' the codes"),
        ('{"codes": 2, "items": {"a": 3}}', "the item 'a' the codes 3"),
    ],
)
def test_damaged_tables_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        read_table(text, "x")


def test_a_trie_counts_the_items_below_each_code():
    codes = [[0, 1], [0, 1], [0, 2], [2, 0], [2, 2]]
    trie = Trie(torch.tensor(codes), 3)
    none = torch.full((1, 1), -1)
    assert trie.remaining(torch.tensor([Trie.root]), none).tolist() == [[3, 0, 2]]
    zero = trie.child(torch.tensor([Trie.root]), torch.tensor([0]))
    assert trie.remaining(zero, none).tolist() == [[0, 2, 1]]
    leaf = trie.child(zero, torch.tensor([1]))
    assert trie.items(int(leaf)) == [0, 1] and trie.leaves_N.tolist()[:2] == [int(leaf)] * 2
    assert [trie.items(int(one)) for one in trie.leaves_N[2:]] == [[2], [3], [4]]
    used = torch.tensor([[int(zero), int(leaf), -1, -1], [int(zero), int(leaf)] * 2])
    nodes = torch.tensor([Trie.root, int(zero)])
    assert trie.remaining(nodes, used).tolist() == [[2, 0, 2], [0, 0, 1]]


def write_npz(path, ids, embeddings):
    np.savez(path, ids=np.array(ids), embeddings=embeddings)
    return str(path)


def test_the_command_writes_a_folder_and_adds_new_items_to_it(tmp_path, capsys):
    x_ND = points(30)
    source = write_npz(tmp_path / "x.npz", [f"i{n}" for n in range(30)], x_ND.numpy())
    sizes = ["--levels", "2", "--codes", "5"]
    assert command(["items", source, str(tmp_path / "out"), *sizes]) == 0
    assert "event=items items=30 levels=2 codes=5 ids=" in capsys.readouterr().err
    table = open_table(tmp_path / "out", "x")
    assert torch.bincount(table.codes_NL[:, 1]).tolist() == [6] * 5
    new_ND = points(4, seed=5)
    tensors = {"embeddings": new_ND, "ids": torch.arange(4)}
    save_file(tensors, tmp_path / "new.safetensors")
    more = ["items", str(tmp_path / "new.safetensors"), str(tmp_path / "more")]
    assert command([*more, "--codebooks", str(tmp_path / "out")]) == 0
    both = open_table(tmp_path / "more", "x")
    assert both.names == (*table.names, "0", "1", "2", "3")
    books = read_codebooks(tmp_path / "more" / "codebooks.safetensors")
    assert torch.equal(both.codes_NL[30:], books.encode(new_ND))
    assert torch.equal(both.codes_NL[:30], table.codes_NL)
    assert command([*more[:2], str(tmp_path / "again"), "--codebooks", str(tmp_path / "more")]) == 2
    assert "the item '0' has a semantic id in" in capsys.readouterr().err
    assert command(["items", source, str(tmp_path / "out")]) == 2
    assert "which is there; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["a", "b"], [[0.0, 1], [np.nan, 2]], "an embedding of 'b' that is not finite"),
        (["a", "a"], [[0.0, 1], [1, 2]], "has the item 'a' twice; keep one"),
        (["a"], [[0.0, 1], [1, 2]], "has 1 ids and embeddings of shape .2, 2."),
        (["a", "b"], [[0, 1], [1, 2]], "and type int64; give a row of floating-point numbers"),
        ([0.5, 1.5], [[0.0, 1], [1, 2]], "ids that are not texts or whole numbers"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(tmp_path, capsys, ids, rows, message):
    import re

    source = write_npz(tmp_path / "x.npz", ids, np.array(rows))
    assert command(["items", source, str(tmp_path / "out"), "--codes", "2"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_files_without_embeddings_are_refused(tmp_path, capsys):
    (tmp_path / "x.npz").write_text("no zip")
    (tmp_path / "x.safetensors").write_text(json.dumps({}))
    np.savez(tmp_path / "y.npz", other=np.zeros(3))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for name, message in (
        ("x.npz", "x.npz', which cannot be read as an .npz file (File is not a zip file); write"),
        ("one.npz", "one.npz', which cannot be read as an .npz file (File is not a zip file)"),
        ("x.safetensors", "x.safetensors has no ids and embeddings ("),
        ("y.npz", "y.npz has no ids and embeddings (no array 'ids'); give arrays under"),
    ):
        assert command(["items", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert command(["items", str(tmp_path / "z.csv"), str(tmp_path / "out")]) == 2
    assert "give a .npz or .safetensors file" in capsys.readouterr().err
