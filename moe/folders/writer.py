"""Write a Hugging Face model folder, completely or not at all.

Names, types and shapes are known before anything is written, so the shards, their headers and the
index are decided first (shards.py). Then tensors are streamed: one piece of one tensor is in memory
at a time.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import ModelFileError
from ...files import new_folder, sync
from ...progress import Progress
from .expert_hashes import FILE, HashWriter
from .shards import TensorPlan, fill_shards, header
from .tensor_files import INDEX, WEIGHTS


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
    ``max_shard_bytes``, unless a single tensor or expert is larger. expert_hashes.json has a hash
    per expert. The same arguments give the same bytes.

    Raises :class:`ModelFileError` if ``target`` exists already or cannot be written. After an
    error, nothing is left behind.
    """
    assert len({plan.name for plan in plans}) == len(plans), "two tensors have the same name"
    with whole_folder(target) as unfinished:
        _write_json(unfinished / "config.json", config_values)
        if generation_values:
            _write_json(unfinished / "generation_config.json", generation_values)
        save_tokenizer(unfinished)
        _write_shards(unfinished, plans, max_shard_bytes)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``target`` when it is complete, and an error removes it.

    Raises :class:`ModelFileError` if ``target`` exists already or cannot be written.
    """
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    try:
        with new_folder(target) as unfinished:
            yield unfinished
    except OSError as error:
        raise ModelFileError(
            f"{target} could not be written ({error.strerror or error}); "
            "free space or choose another folder."
        ) from error


def _write_shards(folder: Path, plans: Sequence[TensorPlan], limit: int) -> None:
    shards, hashes = fill_shards(plans, limit), HashWriter()
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
                out.write(header(shard))
                for plan in shard:
                    _write_tensor(out, plan, progress, hashes)
            sync(folder / file)  # here and not at the end, so that progress counts what is on disk
    if hashes:
        (folder / FILE).write_text(hashes.text(), encoding="utf-8")


def _write_tensor(out: BinaryIO, plan: TensorPlan, progress: Progress, hashes: HashWriter) -> None:
    done = 0
    for data in bytes_of(plan):
        out.write(data)
        hashes.add(plan, done, data)
        done += len(data)
        progress.advance(len(data))
        del data  # free it before the next piece is made


def bytes_of(plan: TensorPlan) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, as they are stored, in pieces; one is in memory at a time."""
    left = plan.num_bytes
    for part in plan.parts():
        assert part.dtype == plan.dtype, f"{plan.name} has a part of type {part.dtype}"
        is_row = part.shape == plan.shape[1:]
        assert is_row or part.shape[1:] == plan.shape[1:], f"{plan.name} has part {part.shape}"
        flat = part.detach().contiguous().reshape(-1)
        left -= part.nbytes
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        del part, flat
    assert left == 0, f"the parts of {plan.name} are {left} bytes short"


def _write_json(path: Path, values: dict[str, Any], sort_keys: bool = False) -> None:
    text = json.dumps(values, indent=2, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
