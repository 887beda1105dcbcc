"""Check the device and the options that a model is opened with, before anything is read."""

import math

import torch

from ..errors import ConfigError
from ..moe.models.correction import check_correction
from .experts.options import StoreOptions
from .experts.policies.table import check_policy
from .experts.predictors.table import check_predictor
from .experts.sparsity import CORE

CPU = torch.device("cpu")


def check_device(name: str, expert_memory: str | None) -> torch.device:
    """Return the device that experts and their options can be on.

    Raises :class:`ConfigError` for one that does not exist, and for offloading to a GPU.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdigit() or number == ""):
        raise ConfigError(f"device is {name!r}; use cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= count:
        raise ConfigError(f"device is {name!r}, but torch sees {count} of that kind; use cpu.")
    if kind == "cuda" and expert_memory is not None:
        raise ConfigError(
            f"device is {name!r} and expert_memory {expert_memory!r}, but experts are offloaded "
            "for the CPU only; leave one out."
        )
    return torch.device(name)


def check_options(
    options: StoreOptions, expert_memory: str | None, device: torch.device = CPU
) -> None:
    """Raise :class:`ConfigError` for options that do not fit each other or the device."""
    check_policy(options.policy)
    check_predictor(options.predictor)
    if expert_memory is None and not isinstance(options.policy, str):
        raise ConfigError(
            f"expert_policy is a {type(options.policy).__name__}, but all experts are in memory; "
            "set expert_memory, or leave expert_policy out."
        )
    if expert_memory is None and options.log is not None:
        raise ConfigError(
            f"expert_log is {str(options.log)!r}, but all experts are in memory; set "
            "expert_memory, or leave expert_log out."
        )
    if options.sparsity is not None and device.type != "cpu":
        raise ConfigError(
            f"device is '{device}' and expert-sparsity {options.sparsity!r}, but channels are "
            "skipped on the CPU only; leave one out."
        )
    check_lossy(options, expert_memory)


def check_lossy(options: StoreOptions, expert_memory: str | None) -> None:
    """Raise :class:`ConfigError` for options of lossy modes that do not fit the others."""
    if options.fallback is not None:
        if expert_memory is None:
            raise ConfigError(
                f"expert-fallback is {str(options.fallback)!r}, but all experts are in memory; set "
                "expert-memory, or leave expert-fallback out."
            )
        if options.log is not None:
            raise ConfigError(
                f"expert-log is {str(options.log)!r}, but a log cannot say which experts "
                "expert-fallback computed from copies; leave one out."
            )
        if (options.sparsity or "").startswith(CORE):
            raise ConfigError(
                f"expert-sparsity is {options.sparsity!r}, but copies of expert-fallback have no "
                "channels to leave out; leave one out."
            )
    elif options.fallback_above is not None or options.correction is not None:
        name = "expert-correction" if options.fallback_above is None else "expert-fallback-above"
        raise ConfigError(f"{name} is set without expert-fallback; give its folder, too.")
    above = options.fallback_above
    if above is not None and not 0 <= above < math.inf:
        raise ConfigError(f"expert-fallback-above is {above!r}; use a number from 0 upwards.")
    if options.correction is not None:
        check_correction(options.correction, options.correction_threshold)
    elif options.correction_threshold is not None:
        raise ConfigError(
            f"expert-correction-threshold is {options.correction_threshold}, but there is no "
            "expert-correction; give the tokens of its window, too."
        )
