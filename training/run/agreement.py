"""Check that all ranks start with the same configuration, code and data."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...errors import ConfigError
from ...files import sha256_of
from ...moe.models.model import Model
from ...moe.routers.own_code import permitted
from ...parallel.dense.gradients import expert_parameter_names
from ...parallel.watch.watch import Watch
from ..config import RunConfig
from ..data.data import Data

ROOT = Path(__file__).parent.parent.parent
CODE = ("kernels", "moe", "parallel", "training")
"""Folders whose files decide what a step computes."""
SUFFIXES = {".py", ".h", ".cpp"}
MAY_DIFFER = {"run_dir"}
"""Keys whose values may differ between hosts; shared_folder.py checks that they are one folder."""
ABSENT = "absent"

Facts = dict[str, Any]


def check_same_start(config: RunConfig, watch: Watch | None) -> None:
    """Raise :class:`ConfigError` on all ranks if configuration, code or devices differ."""
    facts = {k: v for k, v in _flat(config.model_dump(mode="json")) if k not in MAY_DIFFER}
    facts["the device"] = "a GPU" if torch.cuda.is_available() else "the CPU"
    check_same(facts, "start all ranks with the same configuration", watch)
    code = {"moeyard": __version__, "torch": torch.__version__}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES:
                code[f"moeyard/{path.relative_to(ROOT)}"] = sha256_of(path)[:12]
    for name, module in permitted().items():
        if module.__file__ is not None:
            code[name] = sha256_of(Path(module.__file__))[:12]
    check_same(code, "install the same versions on all hosts", watch)


def check_same(
    facts: Facts, remedy: str, watch: Watch | None, *, are_partial: bool = False
) -> None:
    """Raise :class:`ConfigError` on all ranks, naming the first fact that differs between them.

    Facts are JSON values. With ``are_partial`` a rank may lack facts, and each is compared with
    that of the first rank that has it.
    """
    if watch is None:
        return
    everyone = watch.gather(facts)

    def first_with(key: str) -> int:
        return next(rank for rank, theirs in enumerate(everyone) if key in theirs)

    def judge() -> None:
        for rank, theirs in enumerate(everyone):
            keys = theirs if are_partial else _keys(facts, theirs)
            pairs = [(key, first_with(key) if are_partial else 0) for key in keys]
            pairs = [(k, first) for k, first in pairs if everyone[first].get(k) != theirs.get(k)]
            if not pairs:
                continue
            key, first = pairs[0]
            more = f" ({len(pairs) - 1} more differ)" if len(pairs) > 1 else ""
            raise ConfigError(
                f"{key} is {_shown(theirs, key)} on {watch.where(rank)}, but "
                f"{_shown(everyone[first], key)} on {watch.where(first)}{more}; {remedy}."
            )

    watch.on_rank_0(judge)


def check_same_beginning(data: Data, decoder: Model, watch: Watch | None) -> None:
    """Raise :class:`ConfigError` on all ranks if data, tokenizer or dense weights differ.

    Compares the initial weights while they are whole on every rank: a ``start_from`` folder may
    differ between hosts.
    """
    if watch is None:
        return
    facts = {
        "the hash of the training data": data.identity,
        "the hash of the held-out data": data.held_out_identity,
    }
    if data.tokenizer is not None:
        facts["the hash of the tokenizer"] = data.tokenizer.sha256
    experts = expert_parameter_names(decoder)
    for name, parameter in decoder.named_parameters():
        if name not in experts:
            facts[f"the hash of the weight {name}"] = _digest(parameter.detach())
    remedy = "give all hosts the same files"
    check_same(facts, remedy, watch, are_partial=True)  # stages have different weights


def _digest(tensor: Tensor) -> str:
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:12]


def _keys(ours: Facts, theirs: Facts) -> list[str]:
    return [*ours, *(key for key in theirs if key not in ours)]


def _shown(facts: Facts, key: str) -> str:
    return repr(facts[key]) if key in facts else ABSENT


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("a.b", value)`` for every value of a nested dict."""
    if not isinstance(values, dict) or not values:
        yield prefix.removesuffix("."), values
        return
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.")
