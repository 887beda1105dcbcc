"""Series in CSV files: how they are read, split, scaled and cut into windows; which are refused."""

import json

import numpy as np
import pytest
import yaml

from moeyard.commands.forecast_table import read_table
from moeyard.errors import ConfigError, DataError
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.series import build_series_data
from moeyard.training.data.series_file import read_series
from moeyard.training.read_config import read_run_config

from small_series import values, write


def data_of(folder, *overrides, source=None):
    source = source or folder / "s.csv"
    if not source.exists():
        write(source)
    (folder / "run.yaml").write_text(yaml.safe_dump(values(source, folder / "run")))
    return build_series_data(
        read_run_config(folder / "run.yaml", overrides), folder / "data", Mesh()
    )


def test_parts_follow_each_other_and_are_scaled_by_the_first(tmp_path):
    data = data_of(tmp_path, "data.split=[60,20,30]", "data.context=15")
    series = read_series(tmp_path / "s.csv")
    assert series.names == ("level", "flow") and series.values_NC.shape == (120, 2)
    train_NC = series.values_NC[:60]
    scaled_NC = (series.values_NC - train_NC.mean(axis=0)) / train_NC.std(axis=0)
    assert len(data.train) == 2 * (60 - 20 + 1) and len(data.held_out) == 2 * (20 - 6 + 1)
    window = data.train.rows([41 + 7])  # the second column's
    np.testing.assert_allclose(window.values_BL[0], scaled_NC[7:27, 1], rtol=1e-5, atol=1e-6)
    first, last = data.held_out.rows([0, 29]).values_BL
    np.testing.assert_allclose(first, scaled_NC[45:66, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, scaled_NC[59:80, 1], rtol=1e-5, atol=1e-6)  # the last one
    test = data_of(tmp_path, "data.split=[60,20,30]", "data.held_out=test").held_out
    np.testing.assert_allclose(
        test.rows([0]).values_BL[0], scaled_NC[60:86, 0], rtol=1e-5, atol=1e-6
    )
    scales = json.loads(data.files["series.json"])
    assert scales["context"] == 15
    assert scales["columns"]["flow"]["mean"] == pytest.approx(train_NC[:, 1].mean())
    assert data.tokenizer is None and data.num_train_tokens == 120


def test_shares_are_those_of_all_lines_and_may_leave_some_out(tmp_path):
    data = data_of(tmp_path, "data.split=[0.5,0.25,0]")
    assert len(data.train) == 2 * 41 and len(data.held_out) == 2 * (30 - 6 + 1)


def values_of(data, step, rows):
    return data.train.rows(data.train.at(step, rows)).values_BL


def test_windows_depend_on_seed_and_step_alone_and_each_comes_once_an_epoch(tmp_path):
    data, again = data_of(tmp_path), data_of(tmp_path)
    other = data_of(tmp_path, "seed=4")
    whole = values_of(data, 5, range(8))
    parts = [values_of(again, 5, rows) for rows in (range(3), range(3, 8))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, values_of(other, 5, range(8)))
    assert data.identity == other.identity
    steps = len(data.train) // 8
    seen = [tuple(row.tolist()) for step in range(steps) for row in values_of(data, step, range(8))]
    assert len(set(seen)) == steps * 8


def test_gaps_are_points_that_were_not_observed(tmp_path):
    missing = [(4, "flow"), (5, "flow"), (90, "level")]
    source = write(tmp_path / "gaps.csv", missing=missing)
    source.write_text(source.read_text().replace("2024-01-01 09:00,", "2024-01-01 09:00,NaN #", 1))
    source.write_text(
        "".join(
            line if "#" not in line else f"2024-01-01 09:00,nan,{line.split(',')[-1]}"
            for line in source.read_text().splitlines(keepends=True)
        )
    )
    table_NC = read_series(source).values_NC
    assert np.argwhere(np.isnan(table_NC)).tolist() == [[4, 1], [5, 1], [9, 0], [90, 0]]
    data = data_of(tmp_path, source=source)
    train_N = table_NC[:84, 1]
    window = data.train.rows([len(data.train) - 63])  # the second column's first
    assert window.observed_BL[0].tolist() == [True] * 4 + [False] * 2 + [True] * 14
    assert window.values_BL[0, 4:6].tolist() == [0, 0]
    expected = (train_N[0] - np.nanmean(train_N)) / np.nanstd(train_N)
    assert float(window.values_BL[0, 0]) == pytest.approx(expected, rel=1e-5)
    # No window begins in a gap: 65 starts a column, less one and two.
    assert len(data.train) == 2 * 65 - 1 - 2
    with pytest.raises(DataError, match="gap of 2 points under 'flow' from line 6 on, longer than"):
        data_of(tmp_path, "data.max_gap=1", source=source)


def test_the_line_of_a_gap_is_that_of_the_file(tmp_path):
    source = write(tmp_path / "gaps.csv", missing=[(4, "flow"), (5, "flow")])
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines[:3], "", "", *lines[3:]]) + "\n")
    with pytest.raises(DataError, match="gap of 2 points under 'flow' from line 8 on"):
        data_of(tmp_path, "data.max_gap=1", source=source)


@pytest.mark.parametrize("word", ["", " ", "NaN", "NA", "n/a", "N/A", "null", "None"])
def test_training_and_forecasts_know_the_same_words_for_a_gap(tmp_path, word):
    path = tmp_path / "s.csv"
    path.write_text(f"a,b\n1,2\n3,{word}\n")
    for found_NC in (read_series(path).values_NC, read_table(path).values_CT.T):
        np.testing.assert_array_equal(found_NC, [[1, 2], [3, np.nan]])


def test_a_scale_that_fp64_or_fp32_cannot_hold_is_refused(tmp_path):
    for cells, message in (
        ([f"{1 + line % 3}e-200" for line in range(120)], "'on' cannot be scaled: its standard"),
        ([f"{1 + line % 3}e200" for line in range(120)], "'on' cannot be scaled: its standard"),
        (
            [f"{1 + line % 3}" if line < 100 else "1e60" for line in range(120)],
            "'on' has 1e\\+60 on line 102, which is beyond fp32 at the scale of the training part",
        ),
    ):
        head, *rows = write(tmp_path / "s.csv").read_text().splitlines()
        rows = [f"{row},{cell}" for row, cell in zip(rows, cells, strict=True)]
        (tmp_path / "s.csv").write_text("\n".join([f"{head},on", *rows]) + "\n")
        with pytest.raises(DataError, match=message):
            data_of(tmp_path, "data.split=[80,40,0]")


def test_a_prepared_file_is_used_again_only_for_the_same_settings(tmp_path, monkeypatch):
    from moeyard.training.data import documents

    monkeypatch.setattr(documents, "SETTLED_S", -1)  # the file is new
    first = data_of(tmp_path)
    written = (tmp_path / "data" / "series.safetensors").stat().st_mtime_ns
    assert data_of(tmp_path, "data.horizon=3").identity == first.identity
    assert (tmp_path / "data" / "series.safetensors").stat().st_mtime_ns == written
    assert data_of(tmp_path, "data.columns=[flow]").identity != first.identity
    with pytest.raises(DataError, match=r"data\.horizon is 50, but the validation part has 12"):
        data_of(tmp_path, "data.horizon=50", "data.columns=[flow]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", "line 3 has 'x' under 'b', which is no number; correct it, leave"),
        ("when,b\n2024-01-01,2\n", "line 2 has '2024-01-01' under 'when', which is no number"),
        ("a,b\n1,inf\n", "line 2 has 'inf' under 'b'"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells, but the first line names 2; correct it"),
        ("a,a\n1,2\n", "has two columns 'a'; give each another name"),
        ("date\n2024\n", "has no column of numbers"),
        ("", "has no column of numbers"),
        ('a,b\n"1,2\n', "is not a CSV table"),
    ],
)
def test_files_that_are_no_tables_of_numbers_are_refused(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_series(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=none.csv"], "'none.csv' is not there; give another .csv file"),
        (["data.source=none.txt"], "'none.txt' is no .csv file; give one with names"),
        (["data.columns=[level,speed]"], "has no column 'speed'; choose from date, level, flow"),
        (["data.split=[100,20,20]"], "data.split asks for 140 lines, but .* has 120; lower it"),
        (["train.sequence_length=64", "data.split=[50,50,20]"], "the training part 50 lines"),
        (["train.sequence_length=1"], "train.sequence_length is 1, but a window has 2 points"),
        (["data.horizon=13"], "data.horizon is 13, but the validation part has 12 lines"),
        (["data.context=85"], "data.context is 85, but the validation part has 84 lines before"),
    ],
)
def test_parts_that_are_too_short_are_refused(tmp_path, overrides, message):
    with pytest.raises(DataError, match=message):
        data_of(tmp_path, *overrides)


def test_a_constant_column_is_refused(tmp_path):
    lines = write(tmp_path / "s.csv").read_text().splitlines()
    (tmp_path / "s.csv").write_text("\n".join([lines[0] + ",on", *(f"{x},1" for x in lines[1:])]))
    with pytest.raises(DataError, match="the column 'on' does not change in the training part"):
        data_of(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split=[0.9,0.2,0.1]", "give shares that sum to 1 or less, or three whole numbers"),
        ("data.split=[0.9,0,0.1]", "leaves nothing to train on or nothing for held_out = valid"),
        ("data.columns=[]", "columns is empty; name one or more"),
    ],
)
def test_sections_that_mean_nothing_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, override)
