"""Open a Hugging Face model folder: its configuration, its family and its tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelFileError
from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat, packed_name
from .expert_formats import ExpertFormats, formats_of
from .expert_hashes import DamagedExpertError, ExpertHashes, Key, read_folder_hashes
from .expert_layouts import ExpertViews, Shapes, part_shapes
from .expert_read import ExpertRead, GetBuffer
from .extents import Chunk, DiskOrder, Piece, disk_order
from .families.family import Family
from .file_reader import buffer_of
from .group_sparse_format import StoredFormat
from .hf_config import find_family, from_hf
from .json_file import read_json
from .stored_format import stored_format
from .tensor_files import TensorFiles
from .tensor_names import dense_tensors
from .tied_head import check_copy, check_tied_head
from .unused_weights import check_unused, extra_layer


class ModelFolder:
    """An open model folder. Tensors have the decoder's names, in every family."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path / "config.json")
        self.config: LayersConfig = from_hf(self.values)
        family = find_family(self.values)
        self.family: Family = family.bind(family, self.config)
        self.hashes: ExpertHashes | None = read_folder_hashes(path)
        """What experts are checked against when they are read; None = not at all."""
        self.is_direct = False
        """Whether experts are read around the page cache (``files.open_direct`` first)."""
        moe = self.config.moe
        self._num_parts = 0 if moe is None else len(part_shapes(moe, self.config.d_model))
        packed = stored_format(self.values.get("quantization_config"), self.family)
        self.formats: ExpertFormats = formats_of(packed, self.config, self.family.experts)
        """How each expert is rounded."""
        self.files = TensorFiles(path, packed)
        self._orders: dict[Key, DiskOrder] = {}
        """How whole experts are read, once they were."""

    def check(
        self,
        config: LayersConfig | None = None,
        without: tuple[str, ...] = (),
        ignore_unused_weights: bool = False,
        fresh: tuple[str, ...] = (),
    ) -> str | None:
        """Raise :class:`ModelFileError` unless all tensors exist and fit the configuration: the
        folder's, or another one that will use its weights.

        Reads only headers and stops at the first missing tensor, so that an absurd configuration
        costs nothing. Tensors whose name ends in one of ``without`` may be missing, and those of
        ``fresh`` are not read, whatever their shape. Tensors that neither configuration uses are
        refused, except known extras (unused_weights.py) or with ``ignore_unused_weights``. Returns
        a line that names what is left out, or None.
        """
        if not ignore_unused_weights:
            self._check_number_of_layers()
        if self.config.ties_embeddings and "lm_head.weight" in self.files:
            check_tied_head(self.files, self._name("embed_tokens.weight"))
        used = self._check_all_there(config or self.config, without, fresh)
        if config is not None:
            used |= self._names_of(self.config)
        if self.config.ties_embeddings:
            used.add("lm_head.weight")
        for copy in self.family.copies:
            if copy in self.files:
                check_copy(self.files, copy, self._name("embed_tokens.weight"))
                used.add(copy)
        unused = [name for name in self.files if name not in used]
        return check_unused(str(self.path), unused, self._layers_behind(), ignore_unused_weights)

    def _check_all_there(
        self, config: LayersConfig, without: tuple[str, ...], fresh: tuple[str, ...]
    ) -> set[str]:
        """Return the names of the tensors that a configuration uses."""
        used: set[str] = set()
        for parameter, tensor in dense_tensors(config):
            name = self._name(parameter)
            is_read = not parameter.endswith(without) or parameter in self
            if is_read and parameter not in fresh:
                self.files.check_matrix(name, tuple(tensor.shape))
            used |= self.files.stored_names(name)
        for name, shape in self._expert_tensors(config):
            self.files.check_shape(name, shape)
            used.add(name)
        return used

    def _names_of(self, config: LayersConfig) -> set[str]:
        used = {name for name, _ in self._expert_tensors(config)}
        for parameter, _ in dense_tensors(config):
            used |= self.files.stored_names(self._name(parameter))
        return used

    def _expert_tensors(self, config: LayersConfig) -> Shapes:
        for layer in config.moe_layers:
            assert config.moe is not None, "only MoE models have MoE layers"
            yield from self.family.experts.tensors(self.files, config.moe, config.d_model, layer)

    def _layers_behind(self) -> range:
        """Return the layers that predict further tokens; DeepSeek-V3 has them after the model's."""
        extra = self.family.complete(self.values).get("num_nextn_predict_layers") or 0
        first = self.config.num_layers
        return range(first, first + (extra if isinstance(extra, int) else 0))

    def _check_number_of_layers(self) -> None:
        """Raise :class:`ModelFileError` if the weights are those of a larger model."""
        last = self._layers_behind().stop
        for name in self.files:
            layer = extra_layer(name)
            if layer is not None and layer >= last:
                raise ModelFileError(
                    f"config.json has num_hidden_layers = {self.config.num_layers}, but the "
                    f"weights have {name}; copy the folder again, or correct the number."
                )

    def __contains__(self, parameter: str) -> bool:
        return self._name(parameter) in self.files

    def stored(self, parameter: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return type and shape of a tensor of the decoder outside the experts.

        A quantized matrix has the type that it should be dequantized to.
        """
        name = self._name(parameter)
        if self.files.packed is None or packed_name(name) not in self.files:
            entry = self.files.entry(name)
            return entry.dtype, entry.shape
        packed = self.files.packed.of(name)
        assert isinstance(packed, PackedFormat), f"{name} is no routed expert's"
        rows, words = self.files.entry(packed_name(name)).shape
        return self.dtype, (rows, words * 32 // packed.bits)

    @property
    def packed(self) -> StoredFormat | None:
        """How all experts are rounded; None = not at all.

        Raises :class:`ModelFileError` where some have fewer bits than others: see ``formats``.
        """
        if len(self.formats.kinds) > 1:
            raise ModelFileError(
                f"{self.path} has experts of several widths, which this does not take; use a "
                "folder whose experts are all alike."
            )
        return self.formats.kinds[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of floating-point weights that are not quantized: that outside the layers."""
        first, _ = next(dense_tensors(self.config))
        return self.files.entry(self._name(first)).dtype

    def read_into(self, parameter: str, out: Tensor) -> None:
        """Fill ``out`` with a tensor of the decoder outside the experts."""
        try:
            self.files.read_matrix(self._name(parameter), out)
        except OSError as error:
            raise ModelFileError(f"{self._name(parameter)} could not be read: {error}.") from None

    def expert_reads(
        self, layer: int, expert: int, views: ExpertViews, buffer_of_slot: GetBuffer = buffer_of
    ) -> list[Callable[[], None]]:
        """Return calls that fill an expert's ``views``, to be made one after the other.

        They raise ``OSError`` if reading fails, and :class:`DamagedExpertError` if ``hashes`` knows
        other bytes. Without all parts in ``views`` there is no such check. ``buffer_of_slot``
        returns the memory of a part of ``views``.
        """
        return self.expert_read(layer, expert, views, buffer_of_slot).steps()

    def read_expert(self, layer: int, expert: int, views: ExpertViews) -> None:
        """Fill an expert's ``views``."""
        with self._reading(layer, expert):
            for read in self.expert_reads(layer, expert, views):
                read()

    def check_expert(self, layer: int, expert: int) -> None:
        """Raise :class:`ModelFileError` for an expert whose bytes are not those of its hash."""
        if self.hashes is not None:
            with self._reading(layer, expert):
                self.expert_read(layer, expert, self._no_views()).check()

    def expert_chunks(self, layer: int, expert: int) -> list[Chunk]:
        """Return where an expert's bytes are."""
        pieces = self.family.experts.pieces(self.files, layer, expert, self._no_views())
        return list(self._disk_order((layer, expert), pieces).chunks)

    def _no_views(self) -> ExpertViews:
        """Return views without memory, of all parts."""
        moe = self.config.moe
        assert moe is not None, "only MoE models have experts"
        shapes, dtype = part_shapes(moe, self.config.d_model), self.dtype
        return {part: torch.empty(s, dtype=dtype, device="meta") for part, s in shapes.items()}

    def expert_read(
        self, layer: int, expert: int, views: ExpertViews, buffer_of_slot: GetBuffer = buffer_of
    ) -> ExpertRead:
        """Return what fills an expert's ``views``."""
        pieces = self.family.experts.pieces(self.files, layer, expert, views)
        if len(views) == self._num_parts:
            hashes, order = self.hashes, self._disk_order((layer, expert), pieces)
        else:
            hashes, order = None, disk_order(pieces)
        key = (layer, expert)
        return ExpertRead(key, pieces, order, hashes, self.is_direct, buffer_of_slot)

    def _disk_order(self, key: Key, pieces: list[Piece]) -> DiskOrder:
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = disk_order(pieces)
        return order

    @contextmanager
    def _reading(self, layer: int, expert: int) -> Iterator[None]:
        try:
            yield
        except DamagedExpertError as error:
            raise ModelFileError(f"{error}.") from None
        except OSError as error:
            raise ModelFileError(
                f"expert {expert} of layer {layer} could not be read: {error}."
            ) from None

    def close(self) -> None:
        """Close all files."""
        self.files.close()

    def read_optional(self, name: str) -> dict[str, Any]:
        """Read another JSON file of the folder; empty if it does not exist."""
        path = self.path / name
        return read_json(path) if path.exists() else {}

    def _name(self, parameter: str) -> str:
        """Return a tensor's name in this folder: the first of the family's names that is there."""
        names = self.family.tensor_names(parameter)
        return next((name for name in names if name in self.files), names[0])
