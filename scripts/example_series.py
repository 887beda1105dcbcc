"""Write a CSV file of hourly series: days, weeks and a trend with noise, for a first forecast.

.venv/bin/python scripts/example_series.py series.csv
"""

import argparse
import csv
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--hours", type=int, default=6000, help="lines; default: 6000")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    chosen = parser.parse_args()
    draw = np.random.default_rng(chosen.seed)
    hour_N = np.arange(chosen.hours)
    day_N, week_N = np.sin(2 * np.pi * hour_N / 24), np.cos(2 * np.pi * hour_N / 168)
    slow_N = draw.normal(0, 0.05, chosen.hours).cumsum()  # a random walk
    columns = {
        "load": 50 + 12 * day_N + 5 * week_N + slow_N + draw.normal(0, 1.0, chosen.hours),
        "temperature": 14 + 6 * np.roll(day_N, 3) + 2 * slow_N + draw.normal(0, 0.5, chosen.hours),
        "visits": np.exp(3 + 0.8 * day_N - 0.5 * week_N) + draw.gamma(2.0, 2.0, chosen.hours),
    }
    first = datetime(2024, 1, 1)
    with chosen.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["date", *columns])
        for hour, values in enumerate(zip(*columns.values(), strict=True)):
            table.writerow([first + timedelta(hours=hour), *(f"{value:.4f}" for value in values)])


if __name__ == "__main__":
    main()
