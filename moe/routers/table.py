"""All routers. A new one is a file of this folder and a line here."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Discriminator

from .hash import Hash
from .router import RouterConfig
from .topk import TopK

ROUTERS: tuple[type[RouterConfig], ...] = (
    TopK,
    Hash,
)
"""The configurations of all routers; ``kind`` tells them apart."""

if TYPE_CHECKING:
    AnyRouter = RouterConfig
else:
    AnyRouter = Annotated[Union[ROUTERS], Discriminator("kind")]  # noqa: UP007 - made from a tuple
    """The type of a ``router:`` section."""
