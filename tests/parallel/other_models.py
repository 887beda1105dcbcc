"""Models of other data than plain text, whose numbers are compared between one rank and two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from moeyard.parallel.mesh import Mesh
from moeyard.training.data.session_pairs import SessionPairs, write_pairs
from moeyard.training.data.sessions import build_sessions_data
from moeyard.training.read_config import complete_run_config

import clicks
import labelled
import pairs
import pictures
import small_images
import small_series


class Other(NamedTuple):
    """A kind of data and a model for it."""

    data: str
    """The name of the folder with what the run prepares; cases of one kind share it."""
    model: dict
    """The ``model`` section."""
    write: Callable[[Path], dict]
    """Write small data into a folder and return the ``data`` section."""
    overrides: tuple[str, ...] = ()


def _texts(folder: Path) -> dict:
    source = labelled.write(folder / "texts.jsonl")
    return {"format": "classify", "source": str(source), "eval_fraction": 0.2}


def _series(folder: Path) -> dict:
    gaps = [(7, "flow"), (8, "flow"), (90, "level")]
    source = small_series.write(folder / "series.csv", missing=gaps)
    return {"format": "series", "source": str(source), "horizon": 6}


def _images(folder: Path) -> dict:
    """Some targets of some tasks are missing."""
    source = small_images.write_arrays(folder / "images.npz")
    return {"format": "images", "source": str(source), "eval_fraction": 0.2}


def _pairs(folder: Path) -> dict:
    source = pairs.write(folder / "pairs.jsonl")
    return {"format": "pairs", "source": str(source), "eval_fraction": 0.2}


def _pictures(folder: Path) -> dict:
    source = pictures.write(folder / "pictures.npz")
    sizes = {"eval_images": 3, "eval_steps": 2}  # so ranks have other numbers of images
    return {"format": "super_resolution", "source": str(source), **sizes}


def _sessions(folder: Path) -> dict:
    """A third of the training rows have pairs of made-up sessions, so ranks have other numbers."""
    values = clicks.write(folder / "clicks")
    data = build_sessions_data(complete_run_config(values), folder / "own", Mesh())
    draws = torch.Generator().manual_seed(0)
    sessions_P = torch.arange(0, len(data.train), 3)
    items = [torch.randperm(30, generator=draws)[:6].unflatten(0, (2, 3)) for _ in sessions_P]
    reference_P2 = -20 + torch.rand(len(sessions_P), 2, generator=draws, dtype=torch.float64)
    found = SessionPairs(sessions_P, torch.stack(items), reference_P2, 2 * reference_P2)
    write_pairs(folder / "pairs.safetensors", found, data.train)
    alignment = {"weight": 3, "pairs": str(folder / "pairs.safetensors")}
    return values["data"] | {"alignment": alignment}


def _forecaster(model: dict) -> Other:
    """The last forecast has no window on the second rank."""
    overrides = ("train.sequence_length=20", "train.eval_sequences=5")
    return Other("series", model, _series, overrides)


OTHERS = {
    "encoder": Other("labelled", labelled.ENCODER, _texts),
    "time_moe": _forecaster(small_series.TIME_MOE),
    "moirai": _forecaster(small_series.MOIRAI),
    "pairs": Other("pairs", pairs.ENCODER_DECODER, _pairs),
    "vision": Other("images", small_images.VIT, _images),
    "pictures": Other("pictures", pictures.MODEL, _pictures),
    "sessions": Other("sessions", clicks.MODEL, _sessions, ("train.sequence_length=30",)),
}


def cases_of(name: str, section: dict, ep: int, options: list[str]) -> dict[str, dict]:
    """Return the cases of a kind: on two ranks as it is and with shards; on one rank as it is, and
    one that goes on from the checkpoint of two."""
    other = OTHERS[name]
    overrides = [
        *options,
        f"parallel.ep={ep}",
        f"model={json.dumps(other.model)}",
        f"data={json.dumps(section)}",
        *other.overrides,
    ]
    case = {"overrides": overrides, "data": other.data, "evaluates": True}
    if ep == 1:
        return {f"{name}-1": case, f"{name}-again-1": case | {"resumes": f"{name}-2"}}
    shards = [*overrides, "parallel.dense=fsdp"]
    return {f"{name}-2": case | {"saves": 2}, f"{name}_fsdp-2": case | {"overrides": shards}}
