"""The hash router's tables, and what they read of a text."""

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.layer import MoELayer
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.hash import Hash, HashRouter
from moeyard.moe.routers.hash_tables import rows_of_pairs
from moeyard.moe.routers.kmeans_fit import fit_centroids, nearest
from moeyard.moe.routers.routing import RouterInput

V, E = 60, 4


def planted(width: int = 6) -> tuple[torch.Tensor, list[int]]:
    """Return embeddings around E far-apart centres, and each token's centre."""
    generator = torch.Generator().manual_seed(1)
    groups = [token * 7 % E for token in range(V)]
    centres = 20 * torch.eye(E, width)
    return centres[groups] + torch.randn(V, width, generator=generator), groups


def hash_router(table: str, k: int = 1, counts=None, **options) -> HashRouter:
    embeddings = planted()[0] if table in ("clustered", "dispersed") else None
    return HashRouter(Hash(table=table, k=k, **options), E, V, counts, embeddings)


def model(table: str, k: int = 1) -> Decoder:
    moe = MoEConfig(num_experts=E, d_expert=8, router=Hash(table=table, k=k))
    config = ModelConfig(vocab_size=V, d_model=16, num_layers=2, num_heads=2, moe=moe)
    decoder = Decoder(config).eval()
    initialize(decoder, seed=0)
    return decoder


def test_clusters_are_means_of_the_rows_nearest_to_them():
    rows = planted()[0]
    centroids = fit_centroids(rows, E, seed=3)
    for cluster in range(E):
        members = [
            row.double()
            for row in rows
            if min(range(E), key=lambda c: (row - centroids[c]).norm()) == cluster
        ]
        torch.testing.assert_close(torch.stack(members).mean(0), centroids[cluster])
    assert torch.equal(centroids, fit_centroids(rows, E, seed=3))
    assert len(set(nearest(rows, centroids).tolist())) == E


def test_clusters_of_equal_rows_and_too_few_rows():
    centroids = fit_centroids(torch.ones(5, 3), 3)
    assert torch.equal(centroids, torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="2 rows for 3 clusters"):
        fit_centroids(torch.ones(2, 3), 3)


def test_a_clustered_table_gives_similar_tokens_the_same_expert():
    table, (_, groups) = hash_router("clustered").table_VK[:, 0].tolist(), planted()
    experts = {group: {table[v] for v in range(V) if groups[v] == group} for group in range(E)}
    assert sorted(map(len, experts.values())) == [1] * E
    assert set.union(*experts.values()) == set(range(E))
    two = hash_router("clustered", k=2).table_VK
    assert two[:, 0].tolist() == table and (two[:, 0] != two[:, 1]).all()


@pytest.mark.parametrize("k", [1, 3])
def test_a_dispersed_table_gives_similar_tokens_different_experts(k):
    counts = [(v * 13) % 17 for v in range(V)]
    table, (_, groups) = hash_router("dispersed", k, counts).table_VK, planted()
    assert all(len(set(row)) == k for row in table.tolist())
    assert table.flatten().bincount().tolist() == [V * k // E] * E
    for group in range(E):
        of_group = table[[g == group for g in groups]].flatten().bincount(minlength=E)
        assert of_group.max() - of_group.min() <= 1
        # The most frequent tokens of a cluster are on different experts.
        members = [v for v in range(V) if groups[v] == group]
        frequent = sorted(members, key=lambda v: (-counts[v], v))[: E // k]
        assert len(set(table[frequent].flatten().tolist())) == E // k * k


def test_tables_of_embeddings_need_those_of_the_vocabulary():
    with pytest.raises(ConfigError, match=r"needs token embeddings; set router\.embeddings"):
        HashRouter(Hash(table="clustered"), E, V)
    with pytest.raises(ConfigError, match=r"\[60, 6\], but the vocabulary has 61"):
        HashRouter(Hash(table="clustered"), E, V + 1, None, planted()[0])
    with pytest.raises(ValueError, match="table is random, which reads none"):
        Hash(table="random", embeddings="folder")
    with torch.device("meta"):  # where a folder's table is read later
        assert HashRouter(Hash(table="dispersed", k=2), E, V).table_VK.shape == (V, 2)
    padded = torch.cat((planted()[0], torch.full((3, 6), torch.nan)))
    layer = MoELayer(*(8, 4, E, Hash(table="clustered")), vocab_size=V, token_embeddings=padded)
    assert torch.equal(layer.gate.table_VK, hash_router("clustered").table_VK)


def test_pairs_of_tokens_are_spread_evenly_and_every_part_of_a_pair_counts():
    first, second = torch.meshgrid(torch.arange(V), torch.arange(-1, V), indexing="ij")
    rows = rows_of_pairs(first.flatten(), second.flatten(), V).view(V, V + 1)
    assert rows.min() >= 0 and rows.max() < V
    counts = rows.flatten().bincount(minlength=V)
    assert counts.min() > 0.5 * (V + 1) and counts.max() < 2 * (V + 1)
    for line in (*rows, *rows.T):  # another token before, or after, is another row
        assert len(set(line.tolist())) > V // 2


def test_a_bigram_table_reads_the_token_before_in_the_same_sequence():
    gate = hash_router("bigram", k=2)
    ids = torch.tensor([5, 9, 5, 9, 9])
    rows = gate.route(RouterInput(ids_T=ids, lengths=(2, 0, 3))).experts_TK
    previous = [-1, 5, -1, 5, 9]
    for token, (now, before) in enumerate(zip(ids.tolist(), previous, strict=True)):
        row = int(rows_of_pairs(torch.tensor(now), torch.tensor(before), V))
        assert torch.equal(rows[token], gate.table_VK[row])
    given = RouterInput(ids_T=ids, previous_ids_T=torch.tensor(previous))
    assert torch.equal(gate.route(given).experts_TK, rows)
    assert gate.route(RouterInput(ids_T=ids[:0])).experts_TK.shape == (0, 2)


def test_a_bigram_model_goes_on_with_the_token_before_from_its_cache():
    """In chunks, one by one, next to others, and after a step that was taken back."""
    decoder = model("bigram", k=2)
    ids = torch.arange(24).view(2, 12) * 31 % V
    whole = decoder(batch_of_rows(ids))
    experts = [r.experts_TK.view(2, 12, 2) for r in whole.routings]
    caches = [decoder.new_cache() for _ in ids]
    with torch.inference_mode():
        for start, end in [(0, 5), (5, 6), (6, 7), (7, 12)]:
            decoder(batch_of([(row[start:end] + 1) % V for row in ids], caches))
            for cache in caches:  # taken back, as after a failure
                cache.length = start
            output = decoder(batch_of([row[start:end] for row in ids], caches))
            for found, expected in zip(output.routings, experts, strict=True):
                wanted = expected[:, start:end].reshape(-1, 2)
                assert torch.equal(found.experts_TK, wanted)
    assert [int(cache.last_id()) for cache in caches] == ids[:, -1].tolist()


def test_a_cache_keeps_its_tokens_when_it_grows():
    cache = model("bigram").new_cache()
    cache.reserve(60)
    cache.keep_ids(torch.arange(60))
    cache.length = 60
    cache.reserve(140)
    cache.keep_ids(torch.arange(300, 440))
    assert int(cache.last_id()) == 59
    cache.length = 200
    assert int(cache.last_id()) == 439
    cache.length = 7
    assert int(cache.last_id()) == 6


def test_multihash_is_one_mlp_made_of_segments():
    """Its k experts are the segments of a wide MLP, in value and in all gradients."""
    torch.manual_seed(0)
    config = Hash(table="multihash", k=2)
    layer = MoELayer(6, 5, E, config, vocab_size=V, backend="reference").double()
    ids, x = torch.randint(V, (9,)), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, token_ids=ids)
    half = E // 2
    assert (routing.experts_TK[:, 0] < half).all() and (routing.experts_TK[:, 1] >= half).all()
    rows = []
    for token in range(9):
        pair = routing.experts_TK[token].tolist()
        gates = torch.cat([layer.experts.fc1[e].chunk(2)[0] for e in pair])
        ups = torch.cat([layer.experts.fc1[e].chunk(2)[1] for e in pair])
        downs = torch.cat([layer.experts.fc2[e] for e in pair], dim=1)
        rows.append(downs @ (torch.nn.functional.silu(gates @ x[token]) * (ups @ x[token])))
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, layer.experts.fc1, layer.experts.fc2]
    found = torch.autograd.grad(y.square().sum(), leaves)
    right = torch.autograd.grad(expected.square().sum(), leaves)
    for gradient, wanted in zip(found, right, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_multihash_draws_each_group_apart_and_needs_equal_groups():
    table = hash_router("multihash", k=2).table_VK
    groups = torch.stack([table[:, 0], table[:, 1] - E // 2])
    assert set(groups.flatten().tolist()) == set(range(E // 2))
    assert not torch.equal(*groups)
    assert not torch.equal(table, hash_router("multihash", k=2, seed=1).table_VK)
    with pytest.raises(ConfigError, match="needs 3 equal groups of the layer's 4 experts"):
        hash_router("multihash", k=3)
