"""``moeyard forecast``: what comes after the series of a table."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import replace_text
from .options import Parsers, add_command, add_loading, add_model, cannot_write

if TYPE_CHECKING:
    import numpy as np

    from ..moe.models.series_values import Forecast
    from .forecast_table import SeriesTable


def add(parsers: Parsers) -> None:
    """Add the command."""
    forecast = add_command(parsers, "forecast", "continue the time series of a table")
    add_model(forecast)
    forecast.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help=".csv with a column for each series, a row for each point and names in the first line",
    )
    forecast.add_argument("--horizon", type=int, required=True, metavar="H", help="points ahead")
    forecast.add_argument(
        "--columns", metavar="A,B", help="columns to continue; default: all but that of the dates"
    )
    forecast.add_argument(
        "--quantiles",
        metavar="Q,Q",
        help="numbers between 0 and 1 with commas between them, for a model that forecasts "
        "distributions; default: 0.1,0.5,0.9",
    )
    forecast.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="points of a series that are read, the last ones; default: as many as the run's "
        "evaluations read, or without a run the model's most",
    )
    forecast.add_argument(
        "--seed", type=int, default=0, help="seed of a model that draws samples; default: 0"
    )
    forecast.add_argument(
        "--batch", type=int, default=32, metavar="N", help="series computed together; default: 32"
    )
    forecast.add_argument(
        "--format",
        choices=("csv", "json"),
        help="of what is written; default: the end of --out, or csv",
    )
    forecast.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write; default: standard output"
    )
    add_loading(forecast)
    forecast.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the forecasts."""
    from ..serving.openers.series import SERIES_KINDS
    from .forecast_table import continue_dates, read_table
    from .model_folder import open_kind_of

    if arguments.horizon < 1:
        raise ConfigError(f"--horizon is {arguments.horizon}; use a number from 1 upwards.")
    quantiles = _quantiles(arguments.quantiles)
    columns = None if arguments.columns is None else arguments.columns.split(",")
    table = read_table(arguments.file, columns)
    forecaster = open_kind_of(arguments, *SERIES_KINDS)
    question = forecaster.question(arguments.horizon, quantiles, arguments.context, arguments.seed)
    contexts = [
        forecaster.context_of(values_T, question, f"column {name!r}", name)
        for name, values_T in zip(table.columns, table.values_CT, strict=True)
    ]
    dates = continue_dates(table, arguments.horizon)
    if dates is None and table.dates_T:
        sys.stderr.write("event=irregular_dates; rows are numbered instead\n")
    forecasts = forecaster.run_all(contexts, question, arguments.batch)
    kind = arguments.format or ("json" if (arguments.out or Path()).suffix == ".json" else "csv")
    text = (_as_json if kind == "json" else _as_csv)(table, dates, forecasts)
    if arguments.out is None:
        sys.stdout.write(text)
        return
    try:
        replace_text(arguments.out, text)
    except OSError as error:
        raise cannot_write("--out", arguments.out, error) from None


def _quantiles(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        quantiles = [float(part) for part in text.split(",")]
    except ValueError:
        quantiles = []
    if not quantiles or not all(0 < quantile < 1 for quantile in quantiles):
        raise ConfigError(
            f"--quantiles is {text!r}; use numbers between 0 and 1, such as 0.1,0.5,0.9."
        )
    return quantiles


def _as_csv(
    table: "SeriesTable", dates: Sequence[str] | None, forecasts: "Sequence[Forecast]"
) -> str:
    """Return a table: dates or numbers of the steps, then each series and its quantiles."""
    names: list[str] = []
    columns: list[list[str]] = []
    for name, forecast in zip(table.columns, forecasts, strict=True):
        parts = {name: forecast.mean}
        parts |= {f"{name}_q{q}": values for q, values in (forecast.named_quantiles or {}).items()}
        names += parts
        columns += [[str(value) for value in _short(values)] for values in parts.values()]
    steps = dates or [str(step) for step in range(1, len(columns[0]) + 1)]
    names = [(table.date_column if dates else None) or "step", *names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"the forecast would have two columns {twice!r}; rename that of the table, or use "
            "--format json."
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(steps, *columns, strict=True))
    return text.getvalue()


def _as_json(
    table: "SeriesTable", dates: Sequence[str] | None, forecasts: "Sequence[Forecast]"
) -> str:
    """Return an object with the forecast of each column by its name."""
    series: dict[str, Any] = {}
    for name, forecast in zip(table.columns, forecasts, strict=True):
        series[name] = {"mean": _short(forecast.mean), "quantiles": None}
        quantiles = forecast.named_quantiles
        if quantiles is not None:
            own = {quantile: _short(values) for quantile, values in quantiles.items()}
            series[name]["quantiles"] = own
    found = {"horizon": len(forecasts[0].mean), "dates": dates, "series": series}
    return json.dumps(found, ensure_ascii=False) + "\n"


def _short(values_H: "np.ndarray") -> list[float]:
    """Return numbers with 12 digits: forecasts come from fp32, and scales from fp64."""
    return [float(f"{value:.12g}") for value in values_H]
