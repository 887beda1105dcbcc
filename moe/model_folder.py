"""Hugging Face model folders: open one for reading, write one whole or not at all."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError
from .config import ModelConfig
from .hf_config import from_hf
from .router import TopK
from .safetensors_file import SafetensorsFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensor_name(parameter: str) -> str:
    """Return the Hugging Face name of one of the decoder's own (non-expert) tensors."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def expert_tensor_name(layer: int, expert: int, part: str) -> str:
    """Return the Hugging Face name of an expert's ``gate``, ``up`` or ``down`` matrix."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that ``config`` asks for, layer by layer."""
    d_model, width = config.d_model, config.head_width
    embedding = (config.vocabulary, d_model)
    yield tensor_name("embed_tokens.weight"), embedding
    yield tensor_name("norm.weight"), (d_model,)
    if not config.tie_embeddings:
        yield "lm_head.weight", embedding
    q_width, kv_width = config.num_heads * width, config.kv_heads * width
    attention = {"q_proj": (q_width, d_model), "k_proj": (kv_width, d_model)}
    attention |= {"v_proj": (kv_width, d_model), "o_proj": (d_model, q_width)}
    for layer in range(config.num_layers):
        prefix = tensor_name(f"layers.{layer}.")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (d_model,)
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{norm}.weight", (width,)
        for name, shape in attention.items():
            yield f"{prefix}self_attn.{name}.weight", shape
        yield from _mlp_tensors(config, layer, f"{prefix}mlp.")


def _mlp_tensors(
    config: ModelConfig, layer: int, prefix: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    moe, d_model = config.moe, config.d_model
    if moe is None or not config.is_moe(layer):
        assert config.d_ff is not None, "the configuration was not validated"
        yield from _gated_mlp(prefix, config.d_ff, d_model)
        return
    if isinstance(moe.router, TopK):
        yield f"{prefix}gate.weight", (moe.num_experts, d_model)
    else:
        yield f"{prefix}gate.table_VK", (config.vocabulary, moe.router.k)
    for expert in range(moe.num_experts):
        yield from _gated_mlp(f"{prefix}experts.{expert}.", moe.d_expert, d_model)
    if moe.d_shared:
        yield from _gated_mlp(f"{prefix}shared_expert.", moe.d_shared, d_model)


def _gated_mlp(prefix: str, width: int, d_model: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (width, d_model)
    yield f"{prefix}up_proj.weight", (width, d_model)
    yield f"{prefix}down_proj.weight", (d_model, width)


class ModelFolder:
    """An open model folder: its configuration and its tensors by Hugging Face name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = self._read_json("config.json")
        self.config: ModelConfig = from_hf(self.values)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for name in self._file_names():
            file = SafetensorsFile(path / name)
            self._files[name] = file
            self._file_of.update(dict.fromkeys(file.entries, file))
        self._check_index()

    def locate(self, name: str) -> SafetensorsFile:
        """Return the file that holds tensor ``name``."""
        if name not in self._file_of:
            raise ModelFileError(
                f"{self.path} has no tensor {name!r}, which its config.json asks for; "
                "copy the folder again."
            )
        return self._file_of[name]

    def check(self) -> None:
        """Raise :class:`ModelFileError` unless all tensors are there and fit the configuration.

        Reads headers only, and stops at the first tensor that is missing, so that an absurd
        configuration costs nothing.
        """
        for name, shape in expected_tensors(self.config):
            self.locate(name).check_shape(name, shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with tensor ``name``."""
        try:
            self.locate(name).read_into(name, out)
        except OSError as error:
            raise ModelFileError(f"{name} could not be read: {error}.") from None

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def read_optional(self, name: str) -> dict[str, Any]:
        """Read another JSON file of the folder; an absent one reads as empty."""
        return self._read_json(name) if (self.path / name).exists() else {}

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelFileError(
                f"{self.path / name} cannot be read ({error.strerror}); "
                "give a Hugging Face model folder."
            ) from None
        except (ValueError, RecursionError):
            raise ModelFileError(f"{self.path / name} is not JSON; copy it again.") from None
        if not isinstance(values, dict):
            raise ModelFileError(f"{self.path / name} is not a JSON object; copy it again.")
        return values

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).exists():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFileError(f"{INDEX} has no weight_map; copy the folder again.")
            self._index: dict[str, str] = weight_map
            for name in weight_map.values():
                if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\.safetensors", name):
                    raise ModelFileError(f"{INDEX} names {name!r}, which is not in the folder.")
            return sorted(set(self._index.values()))
        self._index = {}
        if not (self.path / WEIGHTS).exists():
            remedy = "copy the folder again"
            if any(self.path.glob("*.bin")):
                remedy = "pickled .bin weights are not read, so convert them to safetensors"
            raise ModelFileError(f"{self.path} has no {WEIGHTS} and no {INDEX}; {remedy}.")
        return [WEIGHTS]

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if name not in self._files[file].entries:
                raise ModelFileError(f"{INDEX} says {name} is in {file}, but it is not.")


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
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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
