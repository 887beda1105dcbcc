"""DDIM: images from noise in few steps (Song et al. 2021, arXiv 2010.02502).

B images; images are ``[B, C, H, W]``.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .schedule import Schedule


class Predict(Protocol):
    """A model that says which noise is in images."""

    def __call__(self, x_BCHW: Tensor, time: int, following: int | None) -> Tensor:
        """Return the noise of images at a timestep; ``following`` is the next call's timestep."""
        ...


def ddim(
    predict: Predict,
    schedule: Schedule,
    x_BCHW: Tensor,
    steps: int,
    eta: float = 0.0,
    draw: Callable[[int], Tensor] | None = None,
    bound: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return what ``predict`` makes of the noise ``x_BCHW``.

    With ``eta`` 0 nothing is drawn; with 1 the steps are those of DDPM. ``draw`` returns the fresh
    noise of a step, which ``eta`` needs. ``bound`` brings a guess of the images into their range.
    """
    times = schedule.times(steps)
    for place, time in enumerate(times):
        following = times[place + 1] if place + 1 < steps else None
        noise_BCHW = predict(x_BCHW, time, following)
        now, then = schedule.kept(time), schedule.kept(following)
        guess_BCHW = (x_BCHW - (1 - now) ** 0.5 * noise_BCHW) / now**0.5
        if bound is not None:
            guess_BCHW = bound(guess_BCHW)
        std = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x_BCHW = then**0.5 * guess_BCHW + (1 - then - std**2) ** 0.5 * noise_BCHW
        if std:
            assert draw is not None, "eta needs fresh noise"
            x_BCHW = x_BCHW + std * draw(place)
    return x_BCHW
