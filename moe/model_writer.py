"""Write a Hugging Face model folder, whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError
from .model_folder import INDEX, WEIGHTS


def write_model_folder(
    target: Path,
    config_values: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], None],
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a folder under a hidden name and rename it when it is complete.

    ``tensors`` may be a generator; at most one shard is in memory beside what it yields.
    """
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", config_values)
        eos = config_values["eos_token_id"]
        _write_json(
            temporary / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos}
        )
        save_tokenizer(temporary)
        _write_shards(temporary, tensors, max_shard_bytes)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelFileError(
            f"{target} could not be written ({error.strerror}); "
            "free space or choose another folder."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _fill_shards(tensors, limit):
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        _share_like_others(folder / f"part-{len(shards) - 1}")
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _share_like_others(path: Path) -> None:
    """Give a file the mode that others here get: safetensors makes its files for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _fill_shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
