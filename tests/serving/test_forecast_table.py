"""Tables of series: what is read, what is refused, and how dates go on."""

import numpy as np
import pytest

from moeyard.commands.forecast_table import continue_dates, read_table
from moeyard.errors import DataError


def table(tmp_path, text, columns=None):
    path = tmp_path / "series.csv"
    path.write_text(text)
    return read_table(path, columns)


def dated(tmp_path, *dates):
    return table(tmp_path, "when,a\n" + "".join(f"{date},1\n" for date in dates))


def test_columns_come_in_the_order_asked_for_and_gaps_are_not_observed(tmp_path):
    text = "date,a,b\n2020-01-01,1,2.5\n2020-01-02,,NaN\n2020-01-03,-3e1,NA\n\n"
    found = table(tmp_path, text)
    assert found.columns == ("a", "b") and found.date_column == "date"
    np.testing.assert_array_equal(found.values_CT, [[1, np.nan, -30], [2.5, np.nan, np.nan]])
    asked = table(tmp_path, text, ["b", "a", "b"])
    assert asked.columns == ("b", "a")
    np.testing.assert_array_equal(asked.values_CT, found.values_CT[::-1])


def test_a_table_without_dates_or_without_a_name_is_read(tmp_path):
    found = table(tmp_path, ",a\n0,5\n1,6\n")
    assert found.date_column is None and found.columns == ("column 1", "a")
    assert continue_dates(found, 3) is None


NEXT = {
    "hours": (["2016-07-01 22:00:00", "2016-07-01 23:00:00"], ["2016-07-02 00:00:00"]),
    "minutes": (["2016-07-01T23:30", "2016-07-01T23:45"], ["2016-07-02T00:00", "2016-07-02T00:15"]),
    "days": (["2020-02-27", "2020-02-28"], ["2020-02-29", "2020-03-01"]),
    "weeks": (["2020-02-20", "2020-02-27"], ["2020-03-05"]),
    "months": (["2019-11", "2019-12"], ["2020-01", "2020-02"]),
    "firsts": (["2019-11-01", "2019-12-01", "2020-01-01"], ["2020-02-01", "2020-03-01"]),
    "ends": (["2019-11-30", "2019-12-31", "2020-01-31"], ["2020-02-29", "2020-03-31"]),
    "quarters": (["2019-09-30", "2019-12-31", "2020-03-31"], ["2020-06-30"]),
    "years": (["2019-05-04", "2020-05-04", "2021-05-04"], ["2022-05-04"]),
    "zone": (
        ["2020-01-01T00:00:00+02:00", "2020-01-01T01:00:00+02:00"],
        ["2020-01-01T02:00:00+02:00"],
    ),
    "utc": (["2020-01-01T00:00:00Z", "2020-01-01T01:00:00Z"], ["2020-01-01T02:00:00Z"]),
}


@pytest.mark.parametrize("case", NEXT)
def test_regular_dates_go_on_as_they_are_written(tmp_path, case):
    given, following = NEXT[case]
    assert continue_dates(dated(tmp_path, *given), len(following)) == following


@pytest.mark.parametrize(
    "dates",
    [
        ["2020-01-01", "2020-01-02", "2020-01-04"],
        ["2020-01-01"],
        ["2020-01-01", "2020-02-02", "2020-03-01"],
        ["9999-12-30", "9999-12-31"],
    ],
)
def test_other_dates_do_not_go_on(tmp_path, dates):
    assert continue_dates(dated(tmp_path, *dates), 2) is None


REFUSED = {
    "text": ("a\n1\nhot\n", "line 3 has 'hot' in column 'a', which is not a number"),
    "infinite": ("a\n1\n-inf\n", "line 3 has '-inf'"),
    "dates_only": ("date\n2020-01-01\n", "has dates, but no column of values"),
    "no_rows": ("a,b\n", "has no rows of values"),
    "no_names": ("1,2\n3,4\n", "has numbers in its first line"),
    "ragged": ("a,b\n1,2\n3\n", "line 3 has 1 cells, but the first line names 2 columns"),
    "twins": ("a,a\n1,2\n", "two columns with the name 'a'"),
    "quotes": ('a\n"1\n', "is not a CSV table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_table_of_numbers_is_refused_in_a_sentence(tmp_path, case):
    text, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        table(tmp_path, text)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


def test_unknown_columns_and_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"--columns names 'c', but .* are a, b; use these"):
        table(tmp_path, "a,b\n1,2\n", ["a", "c"])
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["2020-01-02", "2020-01-01"], "has '2020-01-01' after '2020-01-02'; sort"),
        (["2020-01-01", "2020-01-01"], "sort the rows"),
        (["2020-01-01", "yesterday"], "'yesterday', which is not a date"),
        (["2020-01-01", "2020-01-02T00:00+01:00"], "not both a time zone"),
    ],
)
def test_dates_that_do_not_rise_are_refused(tmp_path, dates, message):
    with pytest.raises(DataError, match=message):
        continue_dates(dated(tmp_path, *dates), 2)
