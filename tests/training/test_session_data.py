"""Sessions from a log: what is learnt, what is held out, and logs that cannot be used."""

import json

import numpy as np
import pytest
import yaml

from moeyard.errors import ConfigError, DataError
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.session_log import read_log
from moeyard.training.data.session_rows import find_sessions
from moeyard.training.data.sessions import build_sessions_data
from moeyard.training.formats.sessions import SessionsConfig
from moeyard.training.read_config import complete_run_config

import clicks

HEAD = "user,session,item,watch_s,liked\n"
NUMBER = {name: place for place, name in enumerate("abcdefgh")}


def config(**keys):
    values = {"source": "x", "items": "x", "session_items": 2, "min_history": 1, "recall_at": 2}
    return SessionsConfig(**values | keys)


def log_of(tmp_path, lines):
    path = tmp_path / "log.csv"
    path.write_text(HEAD + "\n".join(lines) + "\n")
    return read_log(path, "data.source", NUMBER)


LINES = [
    "u,1,a,9,0",
    "v,1,h,9,1",
    "u,1,b,1,0",
    "u,1,c,1,true",
    "u,2,d,5,1",
    "u,2,e,6,0",
    "u,2,f,6,0",
    "u,3,g,1,0",
    "u,3,a,1,0",
    "u,4,h,1,0",
    "u,4,b,9,1",
    "v,2,c,5,1",
    "v,2,d,5,0",
]


def test_histories_have_what_earlier_sessions_liked_or_watched(tmp_path):
    found = find_sessions(log_of(tmp_path, LINES), config(positive_watch_s=5))
    histories = [
        found.history_P[start:end].tolist()
        for start, end in zip(found.starts_C, found.ends_C, strict=True)
    ]
    # The first sessions have no history. a is watched for long, c is liked, b is neither.
    assert histories == [[0, 2], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5], [7]]
    assert found.items_CI.tolist() == [[3, 4], [6, 0], [7, 1], [2, 3]]
    assert found.users_C.tolist() == [0, 0, 0, 1]
    assert found.is_good_C.tolist() == [True, False, True, True]
    assert found.is_held_out_C.tolist() == [False, False, True, False]
    assert found.is_learnt_C.tolist() == [True, False, False, True]
    assert found.is_before_held_out_C.tolist() == [True, True, False, True]


def test_sessions_must_be_long_watched_and_liked(tmp_path):
    log = log_of(tmp_path, LINES)
    watched = find_sessions(log, config(positive_watch_s=5, session_watch_s=11))
    assert watched.is_good_C.tolist() == [True, False, False, False]
    assert find_sessions(log, config(session_items=3)).items_CI.tolist() == [[3, 4, 5]]
    assert find_sessions(log, config(positive_watch_s=5, min_history=3)).users_C.tolist() == [0, 0]


def test_csv_and_parquet_are_the_same_log(tmp_path):
    pytest.importorskip("pyarrow")
    clicks.WORLD.write(tmp_path)
    number = clicks.small_table().number
    tables = [read_log(tmp_path / f"log.{kind}", "x", number) for kind in ("csv", "parquet")]
    for one, other in zip(*tables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_world_is_the_same_for_a_seed_and_rewards_variety(tmp_path):
    for name in ("one", "two"):
        clicks.WORLD.write(tmp_path / name)
    assert (tmp_path / "one/log.csv").read_bytes() == (tmp_path / "two/log.csv").read_bytes()
    world = type(clicks.WORLD).read(tmp_path / "one")
    wishes = world.wishes(0, np.array([0, 4, 1]))  # 0 and 4 are of one category
    alone = [float(world.wishes(0, np.array([item]))[0]) for item in (0, 4, 1)]
    assert wishes == pytest.approx(np.array(alone) - [0, 0.8, 0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u,1,x,1,0", "line 2 has the item 'x', which is not in the table of items; give it a"),
        ("u,1,a,long,0", "line 2 has 'long' under watch_s; give a number of seconds"),
        ("u,1,a,-1,0", "line 2 has '-1' under watch_s"),
        ("u,1,a,nan,0", "line 2 has 'nan' under watch_s"),
        ("u,1,a,1,yes", "line 2 has 'yes' under liked; give 1 or 0"),
        (",1,a,1,0", "line 2 has the user ''; give a word or a whole number"),
        ("u,1,a", "line 2 has None under watch_s"),
    ],
)
def test_lines_that_cannot_be_used_are_refused(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        log_of(tmp_path, [line])


def test_files_that_are_no_log_are_refused(tmp_path):
    with pytest.raises(DataError, match="which has no events; give a log with some"):
        log_of(tmp_path, [])
    path = tmp_path / "other.csv"
    path.write_text("user,item\nu,a\n")
    with pytest.raises(DataError, match="has no column 'session'; give a table with user, session"):
        read_log(path, "data.source", NUMBER)
    with pytest.raises(DataError, match=r"give a .csv or .parquet file that is there"):
        read_log(tmp_path / "none.csv", "data.source", NUMBER)
    (tmp_path / "x.parquet").write_text("no parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"x.parquet is not a parquet file \("):
        read_log(tmp_path / "x.parquet", "data.source", NUMBER)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return clicks.write(tmp_path_factory.mktemp("clicks"))


def open_data(values, folder, **keys):
    changed = values | {"data": values["data"] | keys}
    return build_sessions_data(complete_run_config(changed), folder / "data", Mesh())


def test_batches_depend_on_seed_and_step_alone_and_read_the_newest_items(values, tmp_path):
    data, again = (open_data(values, tmp_path) for _ in range(2))
    assert data.identity == again.identity
    order = data.train
    chosen = order.at(3, range(8))
    assert chosen == order.at(3, range(4)) + order.at(3, range(4, 8)) == again.train.at(3, range(8))
    rows, table = order.rows(chosen), data.table
    for one, length in zip(chosen, rows.lengths, strict=True):
        whole = order.sessions.history_P[order.sessions.starts_C[one] : order.sessions.ends_C[one]]
        assert order.history(one) == whole[-10:].tolist() and length == 3 * min(len(whole), 10)
    assert rows.targets_BIL.shape == (8, 3, 3)
    assert (rows.source_N.min(), rows.targets_BIL.max()) >= (0, 0)
    assert int(rows.targets_BIL.max()) < table.begin
    num_rows = sum(rows.lengths) + 8 * (3 * 4 - 1)
    assert order.num_rows(range(3, 4)) == num_rows == sum(order.num_rows_of(chosen))


def test_held_out_sessions_are_not_learnt(values, tmp_path):
    data = open_data(values, tmp_path)
    learnt, held_out = (
        {(int(user), int(end)) for user, end in zip(own.users_C, own.ends_C, strict=True)}
        for own in (data.train.sessions, data.held_out.sessions)
    )
    assert learnt and held_out and not learnt & held_out
    latest = dict(sorted(learnt))
    assert all(end > latest[user] for user, end in held_out if user in latest)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"session_watch_s": 1e6}, "no session to train on; a session needs 3 items, 1e.06 s"),
        ({"min_history": 999}, "a like and 999 items of history, so give a longer log"),
        ({"items": "/none"}, "data.items is '/none', whose items.json cannot be read"),
        ({"session_items": 31}, "data.session_items is 31, but .* has 30 items; lower it"),
    ],
)
def test_data_that_do_not_fit_are_refused(values, tmp_path, keys, message):
    with pytest.raises((DataError, ConfigError), match=message):
        open_data(values, tmp_path, **keys)


def test_sizes_that_do_not_fit_are_refused(values, tmp_path):
    with pytest.raises(ConfigError, match="recall_at is 10, but 3 beams with 3 items each have"):
        open_data(values, tmp_path, recall_at=10)
    short = yaml.safe_load(json.dumps(values)) | {"train": clicks.TRAIN | {"sequence_length": 2}}
    with pytest.raises(ConfigError, match="sequence_length is 2, but an item has 3 codes; raise"):
        open_data(short, tmp_path)
