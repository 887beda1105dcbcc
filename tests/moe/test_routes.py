"""Route files: what is written is read, and what is damaged is never taken for something else."""

import dataclasses
import io
import json

import numpy as np
import pytest

from moeyard.errors import ConfigError, DataError
from moeyard.moe.routes.format import Column, header_line, make_header, pack
from moeyard.moe.routes.identity import ModelIdentity
from moeyard.moe.routes.reader import RouteFile, read_routes, route_files
from moeyard.moe.routes.rows import PLAIN, Phase, Routes, joined
from moeyard.moe.routes.summary import summarize
from moeyard.moe.routes.writer import RouteWriter

MODEL = ModelIdentity(architecture="abc", weights="def")
NORMS = Column(name="norms", dtype="float16", shape=("L", "K"))
GUESSES = Column(name="guesses", dtype="int16", shape=("L", 3))


def header_of(experts=8, layers=(0, 2), k=2, weights=True, columns=()):
    return make_header(
        MODEL, layers, experts, k, weights=weights, columns=columns, written_by={"program": "test"}
    )


def random_routes(rows, experts=8, layers=2, k=2, seed=0, step=0, columns=False):
    draw = np.random.default_rng(seed)
    own = {}
    if columns:
        own = {
            "norms": draw.random((rows, layers, k)).astype(np.float16),
            "guesses": draw.integers(-1, experts, (rows, layers, 3)).astype(np.int16),
        }
    return Routes(
        tokens_N=draw.integers(0, 1000, rows).astype(np.int32),
        sequences_N=np.sort(draw.integers(0, 3, rows)).astype(np.int64),
        positions_N=np.arange(rows, dtype=np.int32),
        steps_N=np.full(rows, step, dtype=np.int64),
        phases_N=draw.integers(0, 3, rows).astype(np.uint8),
        experts_NLK=draw.integers(-1, experts, (rows, layers, k)).astype(np.int32),
        weights_NLK=draw.random((rows, layers, k)).astype(np.float32),
        columns=own,
    )


def write(path, header, *parts, **options):
    writer = RouteWriter(path, header, **options)
    for part in parts:
        writer.add(part)
        writer.flush()
    writer.close()
    return writer


def assert_equal(found, expected):
    for name in (*PLAIN, "weights_NLK"):
        actual, wanted = getattr(found, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype and np.array_equal(actual, wanted), name
    assert found.columns.keys() == expected.columns.keys()
    for name, wanted in expected.columns.items():
        assert np.array_equal(found.columns[name], wanted), name


@pytest.mark.parametrize(
    ("experts", "dtype"), [(8, "uint8"), (255, "uint8"), (256, "int16"), (40_000, "int32")]
)
def test_a_file_gives_back_every_column_with_ids_in_the_narrowest_type(tmp_path, experts, dtype):
    header = header_of(experts, columns=(NORMS, GUESSES))
    parts = [random_routes(n, experts, k=k, seed=n, columns=True) for n, k in ((5, 2), (7, 4))]
    write(tmp_path / "a.routes", header, *parts)
    file = RouteFile(tmp_path / "a.routes")
    assert file.header == header
    assert next(c.dtype for c in file.header.columns if c.name == "experts") == dtype
    for found, part in zip(file.chunks(), parts, strict=True):
        assert_equal(found, part)
    assert file.damage is None
    assert_equal(file.read(), joined(parts))
    assert (file.read().experts_NLK[:5, :, 2:] == -1).all(), "a narrower chunk has no third choice"


def test_the_size_is_what_the_header_says_and_ids_alone_are_smaller(tmp_path):
    routes = random_routes(1000)
    sizes = {}
    for weights in (True, False):
        header = header_of(weights=weights)
        sizes[weights] = write(tmp_path / "a.routes", header, routes).num_bytes
        assert sizes[weights] == (tmp_path / "a.routes").stat().st_size
        assert 0 <= sizes[weights] - 1000 * header.row_bytes(2) - len(header_line(header)) < 100
    assert sizes[True] - sizes[False] > 1000 * 2 * 2 * 4
    assert RouteFile(tmp_path / "a.routes").read().weights_NLK is None


def test_rows_are_written_in_chunks_while_they_come(tmp_path):
    writer = RouteWriter(tmp_path / "a.routes", header_of(k=64))
    for number in range(40):
        writer.add(random_routes(100, k=64, seed=number))
        assert writer._waiting_bytes < 1 << 20
    written = list(RouteFile(tmp_path / "a.routes").chunks())
    assert len(written) > 1 and sum(map(len, written)) > 2000, "before the file is closed"
    writer.close()
    assert len(RouteFile(tmp_path / "a.routes").read()) == 4000


def test_a_file_cut_anywhere_is_read_to_its_last_whole_chunk(tmp_path):
    parts = [random_routes(n, seed=n) for n in (5, 3, 4)]
    header = header_of()
    write(tmp_path / "a.routes", header, *parts)
    data = (tmp_path / "a.routes").read_bytes()
    ends = [len(header_line(header))]
    for part in parts:
        ends.append(ends[-1] + len(pack(header, part)))
    for cut in range(ends[0], len(data)):
        (tmp_path / "b.routes").write_bytes(data[:cut])
        file = RouteFile(tmp_path / "b.routes")
        found = list(file.chunks())
        assert len(found) == sum(end <= cut for end in ends[1:])
        rows = sum(map(len, found))
        expected = f"was cut short, or is still being written; {rows} rows before that are read."
        assert file.damage is not None and file.damage.endswith(expected)
        with pytest.raises(DataError, match="cut short"):
            read_routes(tmp_path / "b.routes")


def test_no_changed_byte_becomes_other_rows(tmp_path):
    header, parts = header_of(), [random_routes(n, seed=n) for n in (5, 3)]
    write(tmp_path / "a.routes", header, *parts)
    data = (tmp_path / "a.routes").read_bytes()
    for place in range(len(header_line(header)), len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        (tmp_path / "b.routes").write_bytes(changed)
        file = RouteFile(tmp_path / "b.routes")
        for found, part in zip(file.chunks(), parts, strict=False):
            assert_equal(found, part)
        assert file.damage is not None


@pytest.mark.parametrize("expert", [8, 99, -2])
def test_an_expert_that_does_not_exist_is_refused(tmp_path, expert):
    routes = random_routes(9)
    routes.experts_NLK[4, 1, 0] = expert
    write(tmp_path / "a.routes", header_of(), routes)
    named = expert % 256  # as the file holds it
    message = f"has expert {named} in row 4 of MoE layer 1, but there are 8 experts; record it"
    with pytest.raises(DataError, match=message):
        RouteFile(tmp_path / "a.routes").read()


def test_what_is_not_a_route_file_of_one_recording_gets_a_sentence(tmp_path):
    good = tmp_path / "a.routes"
    write(good, header_of(), random_routes(4))
    line, rest = good.read_bytes().split(b"\n", 1)
    values = json.loads(line)

    def problem(*paths):
        with pytest.raises(DataError) as error:
            read_routes(*paths)
        text = str(error.value)
        assert text.endswith(".") and "\n" not in text
        return text

    def with_header(**changes):
        path = tmp_path / "changed.routes"
        path.write_bytes(json.dumps(values | changes).encode() + b"\n" + rest)
        return path

    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").write_bytes(b"")
    assert "is not a route file" in problem(tmp_path / "text")
    assert "is not a route file" in problem(tmp_path / "none")
    assert "cannot be read (No such file" in problem(tmp_path / "missing")
    assert "has no file *.routes" in problem(tmp_path / "empty")
    assert "version 2 of the format, and this moeyard reads 1" in problem(with_header(version=2))
    assert "damaged header (num_experts" in problem(with_header(num_experts=0))
    assert "no column 'experts' of type int16" in problem(with_header(num_experts=300))
    assert "two columns of one name" in problem(with_header(columns=[*values["columns"]] * 2))
    other = with_header(model={"architecture": "other", "weights": None})
    assert "is of another recording than" in problem(good, other)
    write(tmp_path / "b.routes", header_of())
    assert "has no rows" in problem(tmp_path / "b.routes")


def test_a_file_of_another_model_is_refused_by_what_differs(tmp_path):
    from small_model import CONFIG

    own = make_header(
        MODEL, CONFIG.moe_layers, 6, 2, weights=True, written_by={}
    )  # the right sizes, another architecture
    for header, said in (
        (header_of(6, layers=(0,)), "MoE layers 1, this one has 2"),
        (header_of(8), "experts per layer 8, this one has 6"),
        (own, "the architecture abc, this one has "),
    ):
        write(tmp_path / "a.routes", header, random_routes(1, 6, len(header.moe_layers)))
        with pytest.raises(DataError, match="belongs to another model: " + said):
            RouteFile(tmp_path / "a.routes").check_model(CONFIG)


def test_a_full_file_is_closed_and_whole(tmp_path):
    header, part = header_of(), random_routes(10)
    size = len(header_line(header)) + 2 * len(pack(header, part)) + 30
    writer = write(tmp_path / "a.routes", header, *[part] * 5, max_bytes=size)
    assert writer.is_full
    file = RouteFile(tmp_path / "a.routes")
    assert len(file.read()) == 20 and file.damage is None


def test_a_full_disk_leaves_whole_chunks(tmp_path):
    header, part = header_of(), random_routes(10)
    writer = RouteWriter(tmp_path / "a.routes", header)
    writer.add(part)
    writer.flush()
    real = writer._file

    class Full(io.RawIOBase):
        def write(self, data):
            if len(data) < 300:
                raise OSError(28, "No space left on device")
            return real.write(data[:100])

        def truncate(self, size):
            return real.truncate(size)

    writer._file = Full()
    writer.add(part)
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    file = RouteFile(tmp_path / "a.routes")
    assert_equal(file.read(), part)
    assert (tmp_path / "a.routes").stat().st_size == len(header_line(header)) + len(
        pack(header, part)
    )


def test_the_files_of_ranks_become_the_rows_of_one_process(tmp_path):
    whole = [
        dataclasses.replace(random_routes(12, step=step, seed=step), sequences_N=np.arange(12) // 3)
        for step in (1, 2)
    ]
    whole = [dataclasses.replace(w, positions_N=(np.arange(12) % 3).astype("i4")) for w in whole]
    for rank in (0, 1):
        mine = [part.select(part.sequences_N % 2 == rank) for part in whole]
        write(tmp_path / f"rank-{rank}.routes", header_of(), *mine)
    assert_equal(read_routes(tmp_path), joined(whole))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_summary_is_what_a_count_by_hand_gives(tmp_path, chunk):
    routes = random_routes(60, seed=3)
    sequences_N = np.random.default_rng(1).permutation(np.repeat(np.arange(3), 20))
    positions_N = np.array([(sequences_N[:n] == s).sum() for n, s in enumerate(sequences_N)])
    routes = dataclasses.replace(
        routes, sequences_N=sequences_N, positions_N=positions_N.astype(np.int32)
    )
    parts = [routes.select(slice(n, n + chunk)) for n in range(0, 60, chunk)]
    found = summarize(header_of(), parts)
    assert found.rows == 60 and found.sequences == 3
    assert found.phases == {p.name.lower(): int((routes.phases_N == p).sum()) for p in Phase}
    rows = {
        (int(s), int(p)): experts
        for s, p, experts in zip(
            routes.sequences_N, routes.positions_N, routes.experts_NLK, strict=True
        )
    }
    last_seen: dict[int, int] = {}
    kept, total = np.zeros(2), np.zeros(2)
    for sequence, position in zip(routes.sequences_N, routes.positions_N, strict=True):
        if last_seen.get(int(sequence)) == position - 1:
            before, now = rows[int(sequence), position - 1], rows[int(sequence), int(position)]
            for layer in (0, 1):
                for expert in now[layer][now[layer] >= 0]:
                    kept[layer] += expert in before[layer]
                    total[layer] += 1
        last_seen[int(sequence)] = int(position)
    assert total.min() > 80
    for layer in (0, 1):
        ids = routes.experts_NLK[:, layer]
        counts = np.bincount(ids[ids >= 0], minlength=8)
        summary = found.layers[layer]
        assert (summary.layer, summary.choices) == ((0, 2)[layer], counts.sum())
        assert summary.max_over_mean == pytest.approx(counts.max() / counts.mean())
        share = counts / counts.sum()
        assert summary.entropy == pytest.approx(-(share * np.log(share)).sum())
        assert summary.kept == pytest.approx(kept[layer] / total[layer])


def test_a_model_without_experts_has_no_routes():
    from moeyard.moe.config.model import ModelConfig
    from moeyard.moe.routes.recorder import header_of as header_of_model

    dense = ModelConfig(d_model=8, num_layers=1, num_heads=1, d_ff=8, vocab_size=5)
    with pytest.raises(ConfigError, match="has no experts"):
        header_of_model(dense, written_by={})
    assert route_files([]) == []
