"""All blocks. A new block is a file of this folder and a line here."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Discriminator, SerializeAsAny

from .adam import Adam
from .block import BlockConfig
from .momentum import Momentum
from .residual import Residual
from .robust import Robust

BLOCKS: tuple[type[BlockConfig], ...] = (Residual, Momentum, Adam, Robust)
"""The configurations of all blocks; ``kind`` tells them apart."""

if TYPE_CHECKING:
    AnyBlock = BlockConfig
else:
    AnyBlock = SerializeAsAny[
        Annotated[Union[BLOCKS], Discriminator("kind")]  # noqa: UP007 - made from a tuple
    ]
    """The type of a ``block:`` section."""
