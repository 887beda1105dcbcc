"""``moeyard forecast``: a table in, a table or JSON out."""

import csv
import json

import pytest
from seasonal import Seasonal

from moeyard.cli import main
from moeyard.commands import model_folder
from moeyard.moe.models.forecaster import Forecaster

ROWS = [f"2020-01-{day:02},{day % 4},{(day % 4) / 10},7\n" for day in range(1, 13)]


@pytest.fixture
def forecast(tmp_path, monkeypatch, capsys):
    """Run the command on a table with a model."""
    table = tmp_path / "series.csv"
    table.write_text("day,a,b,flat\n" + "".join(ROWS))

    def run(*options, model=None, text=None):
        if text is not None:
            table.write_text(text)
        chosen = Forecaster(model or Seasonal())
        monkeypatch.setattr(model_folder, "open_kind_of", lambda *_: chosen)
        status = main(["forecast", "MODEL", str(table), *options])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_every_column_goes_on_with_its_dates_and_quantiles(forecast, tmp_path):
    out = tmp_path / "out.csv"
    status, said, _ = forecast("--horizon", "5", "--quantiles", "0.1,0.5", "--out", str(out))
    assert status == 0 and said == ""
    header, *rows = csv.reader(out.read_text().splitlines())
    assert header == [
        *("day", "a", "a_q0.1", "a_q0.5", "b", "b_q0.1", "b_q0.5"),
        *("flat", "flat_q0.1", "flat_q0.5"),
    ]
    assert [row[0] for row in rows] == [f"2020-01-{day}" for day in range(13, 18)]
    numbers = [[float(cell) for cell in row[1:]] for row in rows]
    assert [row[0] for row in numbers] == pytest.approx([1, 2, 3, 0, 1], abs=1e-6)
    assert [row[3] for row in numbers] == pytest.approx([0.1, 0.2, 0.3, 0, 0.1], abs=1e-6)
    assert [row[0] for row in numbers] == [row[2] for row in numbers]
    assert all(float(row[2]) < float(row[3]) for row in rows)
    assert {*rows[0][7:]} == {"7.0"}


def test_json_by_the_name_of_the_file_or_by_format(forecast, tmp_path):
    options = ["--horizon", "2", "--columns", "b"]
    status, said, _ = forecast(*options, "--format", "json", model=Seasonal(quantiles=False))
    assert status == 0
    assert json.loads(said) == {
        "horizon": 2,
        "dates": ["2020-01-13", "2020-01-14"],
        "series": {"b": {"mean": pytest.approx([0.1, 0.2]), "quantiles": None}},
    }
    forecast(*options, "--out", str(tmp_path / "out.json"))
    own = json.loads((tmp_path / "out.json").read_text())["series"]["b"]
    assert own["mean"] == pytest.approx([0.1, 0.2]) and list(own["quantiles"]) == [
        "0.1",
        "0.5",
        "0.9",
    ]


def test_near_quantiles_have_names_of_their_own(forecast):
    options = ["--horizon", "1", "--columns", "b", "--quantiles", "0.1234567,0.1234568"]
    names = forecast(*options)[1].splitlines()[0]
    assert names == "day,b,b_q0.1234567,b_q0.1234568"
    own = json.loads(forecast(*options, "--format", "json")[1])["series"]["b"]["quantiles"]
    assert list(own) == ["0.1234567", "0.1234568"]


def test_irregular_dates_give_numbered_rows_and_a_line(forecast):
    text = "day,a\n2020-01-01,1\n2020-01-02,2\n2020-01-04,3\n2020-01-05,4\n"
    status, said, note = forecast("--horizon", "2", text=text, model=Seasonal(quantiles=False))
    assert status == 0 and note == "event=irregular_dates; rows are numbered instead\n"
    header, *rows = csv.reader(said.splitlines())
    assert header == ["step", "a"] and [row[0] for row in rows] == ["1", "2"]
    assert [float(row[1]) for row in rows] == pytest.approx([1, 2])


def test_context_seed_and_batch_reach_the_model(forecast):
    model = Seasonal()
    options = ["--context", "6", "--seed", "3", "--batch", "1", "--columns", "a,b"]
    assert forecast("--horizon", "2", *options, model=model)[0] == 0
    assert model.batches == [(1, 6, 2, 3)] * 2


POINTS = {"model": Seasonal(quantiles=False)}
BAD = {
    "zero": (["--horizon", "0"], {}, "--horizon is 0; use a number from 1"),
    "far": (["--horizon", "64"], {}, "horizon is 64, but the model takes 64 points"),
    "quantiles": (["--horizon", "2", "--quantiles", "a"], {}, "--quantiles is 'a'"),
    "outside": (["--horizon", "2", "--quantiles", "1.5"], {}, "--quantiles is '1.5'"),
    "points": (["--horizon", "2", "--quantiles", "0.5"], POINTS, "the model forecasts points"),
    "columns": (["--horizon", "2", "--columns", "z"], {}, "--columns names 'z'"),
    "text": (["--horizon", "2"], {"text": "a\n1\nhot\n"}, "line 3 has 'hot' in column 'a'"),
    "short": (["--horizon", "2"], {"text": "a\n1\n"}, "column 'a' has 1 observed point"),
    "gaps": (["--horizon", "2"], {"text": "a,b\n1,2\n,\n,\n,\n3,4\n"}, "column 'a' lacks 3 of"),
    "dates": (["--horizon", "2"], {"text": "day\n2020-01-01\n"}, "has dates, but no column"),
    "order": (
        ["--horizon", "2"],
        {"text": "day,a\n2020-01-02,1\n2020-01-01,2\n"},
        "sort the rows",
    ),
    "tiny": (["--horizon", "2"], {"text": "a\n1e-200\n2e-200\n"}, "column 'a' varies so little"),
    "step": (["--horizon", "2"], {"text": "step\n1\n2\n"}, "would have two columns 'step'"),
    "names": (
        ["--horizon", "2"],
        {"text": "a,a_q0.5\n1,2\n2,3\n"},
        "would have two columns 'a_q0.5'; rename that of the table, or use --format json",
    ),
    "out": (["--horizon", "2", "--out", "/nowhere/out.csv"], {}, "--out is '/nowhere/out.csv'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_continued_is_refused_in_one_sentence(forecast, case):
    options, how, message = BAD[case]
    status, said, error = forecast(*options, **how)
    assert status == 2 and said == ""
    assert message in error and error.count("\n") == 1
