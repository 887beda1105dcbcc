"""Write a Hugging Face model folder, completely or not at all.

Names, types and shapes are known before anything is written, so the shards, their headers and the
index are decided first. Then tensors are streamed: one piece of one tensor is in memory at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import ModelFileError
from ...files import sync
from ...progress import Progress
from .safetensors_file import STORED_DTYPES
from .tensor_files import INDEX, WEIGHTS

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written, and the source of its contents."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]
    """Called once, when the tensor is written. Yields it in consecutive pieces, each one row
    (``shape[1:]``) or several (``[n, *shape[1:]]``); most tensors are one piece."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model_folder(
    target: Path,
    config_values: dict[str, Any],
    plans: Sequence[TensorPlan],
    save_tokenizer: Callable[[Path], None],
    generation_values: dict[str, Any],
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a folder under a hidden name, flush it to disk and rename it when it is complete.

    ``save_tokenizer`` gets the unfinished folder and may put other files there too. Without
    ``generation_values`` there is no generation_config.json. Shards hold at most
    ``max_shard_bytes``, unless a single tensor is larger. The same arguments give the same bytes.

    Raises :class:`ModelFileError` if ``target`` exists already or cannot be written. After an
    error, nothing is left behind.
    """
    assert len({plan.name for plan in plans}) == len(plans), "two tensors have the same name"
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed attempt
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", config_values)
        if generation_values:
            _write_json(temporary / "generation_config.json", generation_values)
        save_tokenizer(temporary)
        _write_shards(temporary, plans, max_shard_bytes)
        _sync_tree(temporary)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelFileError(
            f"{target} could not be written ({error.strerror or error}); "
            "free space or choose another folder."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_shards(folder: Path, plans: Sequence[TensorPlan], limit: int) -> None:
    shards = _fill_shards(plans, limit)
    files = [WEIGHTS]
    total = sum(plan.num_bytes for plan in plans)
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        weight_map = {
            plan.name: file for file, shard in zip(files, shards, strict=True) for plan in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index, sort_keys=True)
    with Progress("writing the model", total, in_bytes=True) as progress:
        for file, shard in zip(files, shards, strict=True):
            with (folder / file).open("wb") as out:
                out.write(_header(shard))
                for plan in shard:
                    _write_tensor(out, plan, progress)
            sync(folder / file)  # here and not at the end, so that progress counts what is on disk


def _fill_shards(plans: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    # Wide types first, like safetensors, so that every tensor starts at a multiple of its type.
    return [sorted(shard, key=lambda plan: -plan.dtype.itemsize) for shard in shards]


def _header(shard: Sequence[TensorPlan]) -> bytes:
    """Return the bytes before the tensors: the length of a JSON object and the object."""
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in shard:
        end = start + plan.num_bytes
        values[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_tensor(out: BinaryIO, plan: TensorPlan, progress: Progress) -> None:
    left = plan.num_bytes
    for part in plan.parts():
        assert part.dtype == plan.dtype, f"{plan.name} has a part of type {part.dtype}"
        is_row = part.shape == plan.shape[1:]
        assert is_row or part.shape[1:] == plan.shape[1:], f"{plan.name} has part {part.shape}"
        flat = part.detach().contiguous().reshape(-1)
        out.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        left -= part.nbytes
        progress.advance(part.nbytes)
        del part, flat  # free them before the next piece is made
    assert left == 0, f"the parts of {plan.name} are {left} bytes short"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _write_json(path: Path, values: dict[str, Any], sort_keys: bool = False) -> None:
    text = json.dumps(values, indent=2, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
