"""Build modules whose parameters take no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """Put what is built here on the meta device and leave out the filling by ``nn.init``.

    Filling a tensor of the meta device would change nothing, but it imports torch._dynamo, which
    takes 150 MB and a second.
    """
    with torch.device("meta"), _NoFilling():
        yield


class _NoFilling(TorchFunctionMode):
    """Makes the functions of ``nn.init`` return their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        arguments = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            tensor: Tensor = args[0] if args else arguments["tensor"]
            return tensor
        return func(*args, **arguments)
