"""The series of a run: read, checked and standardised by rank 0, into the run folder.

N lines, C columns.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ...files import replaced
from ...moe.folders.series_scales import FILE as SCALES
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.series import SeriesConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .documents import Files
from .origins import are_made_from, origin_of
from .series_check import check_gaps, check_parts, check_scaled, check_varies
from .series_file import read_series
from .series_windows import HeldOutWindows, TrainingWindows

FILE = "series.safetensors"


@dataclass(frozen=True, slots=True)
class SeriesData(Data):
    """Windows of series."""

    train: TrainingWindows
    held_out: HeldOutWindows


def build_series_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> SeriesData:
    """Prepare the series on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    series that cannot be trained on.
    """
    data, length = config.data, config.train.sequence_length
    assert isinstance(data, SeriesConfig), "an objective on series has series"
    mesh.on_rank_0(lambda: _prepare(data, length, folder, stop or StopRequest()))
    with safe_open(folder / FILE, "np") as file:
        values_CN, observed_CN = file.get_tensor("values_CN"), file.get_tensor("observed_CN")
    facts = _facts(folder / FILE)
    train, part, _ = data.parts(facts["lines"])
    windows = TrainingWindows(
        values_CN[:, : train.stop],
        observed_CN[:, : train.stop],
        length,
        config.train.batch_sequences,
        config.seed,
    )
    context = data.context or length
    lines = slice(part.start - context, part.stop)
    held_out = HeldOutWindows(values_CN[:, lines], observed_CN[:, lines], context, data.horizon)
    if mesh.rank == 0:
        sys.stderr.write(
            f"event=series columns={len(values_CN)} train_lines={len(train)} "
            f"held_out_lines={len(part)} windows={len(windows)} forecasts={len(held_out)} "
            f"not_observed={int((~observed_CN).sum())}\n"
        )
    scales = {"context": context, "columns": facts["columns"]}
    return SeriesData(
        tokenizer=None,
        train=windows,
        identity=windows.identity,
        num_train_tokens=windows.num_points,
        held_out_identity=held_out.identity,
        held_out=held_out,
        chat_template=None,
        files={SCALES: json.dumps(scales, indent=2) + "\n"},
    )


def _prepare(config: SeriesConfig, length: int, folder: Path, stop: StopRequest) -> None:
    """Write the standardised series unless they are there and were made from the same."""
    make_folder(folder)
    path, source = folder / FILE, Path(config.source)
    print_of_file = Files([source], config.source, "", "data.source").fingerprint()
    settings = [config.time_column, config.columns, config.split, config.max_gap]
    origin = origin_of([print_of_file, settings])
    if are_made_from([path], origin, [print_of_file]):
        check_parts(config, _facts(path)["lines"], length)
        return
    with LongWork("reading series", stop) as work:
        series = read_series(source, config.time_column, config.columns, work.advance)
    count = len(series.values_NC)
    check_parts(config, count, length)
    train, _, end = config.parts(count)
    values_NC = series.values_NC[:end]
    check_gaps(config, series.names, values_NC, series.lines_N)
    check_varies(series.names, values_NC[: train.stop])
    observed_NC = ~np.isnan(values_NC)
    with np.errstate(all="ignore"):  # the next line refuses what comes of it
        mean_C = np.nanmean(values_NC[: train.stop], axis=0)
        std_C = np.nanstd(values_NC[: train.stop], axis=0)
        scaled_NC = np.where(observed_NC, (values_NC - mean_C) / std_C, 0.0)
    check_scaled(series.names, values_NC, std_C, scaled_NC, series.lines_N)
    columns = {
        name: {"mean": float(mean), "std": float(std)}
        for name, mean, std in zip(series.names, mean_C, std_C, strict=True)
    }
    tensors = {
        "values_CN": np.ascontiguousarray(scaled_NC.T.astype(np.float32)),
        "observed_CN": np.ascontiguousarray(observed_NC.T),
    }
    facts = json.dumps({"lines": count, "columns": columns})
    with replaced(path) as unfinished:
        save_file(tensors, unfinished, metadata={"made_from": origin, "facts": facts})


def _facts(path: Path) -> dict[str, Any]:
    """Return the number of lines of the CSV file, and the scales of the columns."""
    with safe_open(path, "np") as file:
        facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
    return facts
