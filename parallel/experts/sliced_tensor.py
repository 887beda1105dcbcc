"""Slices of a tensor that several ranks have, as torch.distributed.checkpoint sees them.

The checkpoint has the whole tensor. It does not say which rank wrote a part. DCP asks objects with
the three methods below (``torch.distributed._checkpointable``) for their parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Piece = tuple[tuple[int, ...], Tensor]
"""Where a part begins in the whole tensor, and the part."""


class SlicedTensor(Tensor):
    """A tensor of which this rank has some pieces. It has a shape and no values of its own.

    Loading it fills the pieces.
    """

    pieces: list[Piece]

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: Sequence[Piece]) -> "SlicedTensor":
        """Return a tensor of the whole ``shape``."""
        first = pieces[0][1]
        made: SlicedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=first.dtype, device=first.device
        )
        made.pieces = [(torch.Size(offset), part) for offset, part in pieces]
        return made

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse every operation."""
        raise TypeError(f"{func} asks for the values of a tensor that is on several ranks")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what to write: each piece."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(part),
                    size=self.size(),
                ),
            )
            for chunk, (_, part) in zip(self.__create_chunk_list__(), self.pieces, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return where the pieces are in the whole tensor."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=part.shape)
            for offset, part in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the piece that DCP named."""
        return next(part for offset, part in self.pieces if offset == index.offset)
