"""The learning rate of a step, a function of the step and the configuration alone.

Nothing is kept between steps, so a resumed run takes the same rates as an unbroken one.
"""

import math

from .optimizers.config import DECAY_SHARE, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of ``step`` (from 0) in a run of ``steps``.

    It rises linearly over ``warmup_steps`` to ``lr``. After that it follows ``schedule`` and would
    reach ``min_lr_ratio * lr`` at step ``steps``, one after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = SCHEDULES[config.schedule](config, step, steps)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def _cosine(config: OptimizerConfig, step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * _progress(step, config.warmup_steps, steps)))


def _linear(config: OptimizerConfig, step: int, steps: int) -> float:
    return 1 - _progress(step, config.warmup_steps, steps)


def _wsd(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return 1 until the last steps of the run, and fall linearly in those."""
    share = DECAY_SHARE if config.decay_share is None else config.decay_share
    decay_from = max(config.warmup_steps, steps - math.ceil(share * steps))
    return 1 - _progress(step, decay_from, steps)


SCHEDULES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd}
"""The share, from 1 to 0, that is left of what lies between ``lr`` and ``min_lr_ratio * lr``."""


def _progress(step: int, start: int, end: int) -> float:
    """Return how far ``step`` is on the way from ``start`` to ``end``, from 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
