"""What an owner is told when it starts, as plain values: it may start on another machine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch

from ...dtypes import short_name, torch_dtype
from ..experts.options import StoreOptions


@dataclass(frozen=True, slots=True)
class OwnerSpec:
    """Settings of one owner. It holds the secret, so it is not printed."""

    index: int
    """Number of the owner, from 1: owner 0 is the leader."""
    model: str
    """Folder, or name on the hub with its commit."""
    dtype: str
    budget_bytes: int
    """Memory for experts."""
    reads_first: Mapping[int, list[int]]
    """Experts that are read before the owner is ready, by layer: all that it owns if it keeps
    them in memory."""
    policy: str
    reader: str
    allow_code: tuple[str, ...]
    num_threads: int
    """Compute threads."""
    leaders_host: str
    """:func:`.connecting.host_identity` of the leader."""
    secret: str
    """In hexadecimal digits."""

    def __repr__(self) -> str:
        """Return what may stand in a log."""
        return f"OwnerSpec({self.index}, {self.model!r})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and rows."""
        return torch_dtype(short_name(self.dtype))

    @property
    def store_options(self) -> StoreOptions:
        """How the owner's store works."""
        return StoreOptions(policy=self.policy, reader=self.reader)

    def to_json(self) -> str:
        """Return the spec as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the spec of :meth:`to_json`."""
        values = json.loads(text)
        values["reads_first"] = {int(k): v for k, v in values["reads_first"].items()}
        values["allow_code"] = tuple(values["allow_code"])
        return cls(**values)
