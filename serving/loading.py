"""Open a model folder for inference, with all experts in memory or behind a store."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from ..dtypes import short_name, spellings, torch_dtype
from ..errors import ConfigError
from ..kernels.values.memory import is_out_of_memory
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from ..moe.models.language_model import LanguageModel
from ..moe.routers.own_code import allow
from .experts.options import StoreOptions
from .experts.policies.policy import Policy
from .experts.predictors.predictor import Predictor
from .experts.store import ExpertStore
from .filling import fill_model
from .load_checks import check_device, check_options
from .openers.table import OPENERS, opener_of
from .speculating import check_speculation, speculate

log = logging.getLogger(__name__)

DTYPES = ("fp32", "bf16")
"""What a model may be loaded as."""


class Loading(TypedDict, total=False):
    """How any kind of model is opened; :func:`load` says what each argument means."""

    dtype: str | torch.dtype | None
    device: str
    expert_memory: str | None
    ignore_unused_weights: bool
    allow_code: str | Sequence[str]
    options: StoreOptions | None


def load(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
    ignore_unused_weights: bool = False,
    allow_code: str | Sequence[str] = (),
    expert_policy: str | Policy = "decayed_lfu",
    expert_predictor: str | Predictor = "none",
    expert_reader: str = "auto",
    expert_log: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    expert_sparsity: str | Path | None = None,
    expert_fallback: str | Path | None = None,
    expert_fallback_above: float | None = None,
    expert_correction: int | None = None,
    expert_correction_threshold: float | None = None,
    speculative: str = "none",
    speculative_rows: int = 16,
) -> LanguageModel:
    """Open a Hugging Face MoE model or a run's export as a model ready to call.

    ``folder`` is a folder with ``config.json`` and safetensors, or a name on the hub
    (``OWNER/MODEL[@REVISION]``), which is downloaded once.

    ``dtype`` is ``fp32`` or ``bf16``, or torch's name or type for them (None = as stored). Routers
    stay in fp32 under bf16, and experts that the folder has in 8 or 4 bits stay in those.
    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``; ids go there too. ``expert_memory``
    (``2GiB``, ``25%``) bounds the experts kept in memory; the others are read when they are needed,
    and outputs are the same bit for bit. ``auto`` is what the machine can spare. Weights that
    ``config.json`` does not ask for are refused, unless ``ignore_unused_weights``. ``allow_code``
    names modules of your own whose routers the folder may use.
    ``expert_policy`` (which expert leaves memory) and ``expert_predictor`` (which are read ahead)
    are names (docs/offloading.md), or objects with the methods of :class:`.Policy` and
    :class:`.Predictor`, a policy for this model alone. ``expert_log`` is a file for every event of
    the store, which is replaced. ``expert_reader`` reads through the page cache (``buffered``),
    around it (``direct``), or measures (``auto``). ``adapters`` are adapter folders by name
    (docs/adapters.md): a call of the model names one of them, or none.
    The others are off by default and change answers (docs/offloading.md): ``expert_sparsity``, a
    file of ``moeyard sparsity`` or ``coreinfer:0.4`` (``exact`` changes nothing);
    ``expert_fallback``, the same model in fewer bits, for missing experts up to
    ``expert_fallback_above``. ``expert_correction`` undoes that, all but for
    ``expert_correction_threshold``.
    ``speculative`` (``ngram`` or ``suffix``) guesses next tokens from the text so far and checks
    several in one step, up to ``speculative_rows`` of them; it changes no answer.

    Raises :class:`ModelFileError` for a folder that is damaged or of an unknown kind and for a
    model that cannot be downloaded, and :class:`ConfigError` for arguments that do not fit.
    """
    lossless = _lossless(expert_policy, expert_predictor, expert_reader, expert_log)
    lossy = (expert_sparsity, expert_fallback, expert_fallback_above, expert_correction)
    options = _with_lossy(lossless, *lossy, expert_correction_threshold)
    check_speculation(speculative, speculative_rows, device, options.fallback)
    how = (dtype, device, expert_memory, ignore_unused_weights, allow_code, options)
    model, _ = open_model(folder, *how)
    speculate(model, speculative, speculative_rows)
    for name, path in (adapters or {}).items():
        model.adapters.load(name, Path(path))
    return model


def _lossless(
    policy: str | Policy, predictor: str | Predictor, reader: str, event_log: str | Path | None
) -> StoreOptions:
    path = None if event_log is None else Path(event_log)
    return StoreOptions(policy=policy, predictor=predictor, reader=reader, log=path)


def _with_lossy(
    options: StoreOptions,
    sparsity: str | Path | None,
    fallback: str | Path | None,
    fallback_above: float | None,
    correction: int | None,
    correction_threshold: float | None,
) -> StoreOptions:
    """Return options with what changes answers."""
    return replace(
        options,
        sparsity=None if sparsity is None else str(sparsity),
        fallback=None if fallback is None else Path(fallback),
        fallback_above=fallback_above,
        correction=correction,
        correction_threshold=correction_threshold,
    )


def open_model(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
    ignore_unused_weights: bool = False,
    allow_code: str | Sequence[str] = (),
    options: StoreOptions | None = None,
) -> tuple[LanguageModel, ExpertStore | None]:
    """Do what :func:`load` does and return the store too, if there is one.

    Raises :class:`ConfigError` for a model that does not continue texts.
    """
    model, store = open_kind(
        folder,
        ("decoder",),
        dtype=dtype,
        device=device,
        expert_memory=expert_memory,
        ignore_unused_weights=ignore_unused_weights,
        allow_code=allow_code,
        options=options,
    )
    assert isinstance(model, LanguageModel), "its kind was asked for"
    return model, store


def open_kind(
    folder: str | Path, kinds: Sequence[str], **how: Unpack[Loading]
) -> tuple[Any, ExpertStore | None]:
    """Open a model of one of ``kinds`` as its opener does, and its store, if there is one.

    Raises :class:`ModelFileError` for a folder that is damaged or of an unknown kind, and
    :class:`ConfigError` for a model of another kind or arguments that do not fit.
    """
    expert_memory, options = how.get("expert_memory"), how.get("options") or StoreOptions()
    target = check_device(how.get("device", "cpu"), expert_memory)
    allow(how.get("allow_code", ()))
    check_options(options, expert_memory, target)
    files = ModelFolder(local_folder(folder))
    try:
        _check_kind(files, kinds)
        left_out = files.check(ignore_unused_weights=how.get("ignore_unused_weights", False))
        if left_out is not None:
            log.warning("%s", left_out)
        dtype = pick_dtype(files, how.get("dtype"))
        filled = fill_model(files, dtype, expert_memory, options, target)
        model = OPENERS[opener_of(files)].open(files, filled, options)
        if filled.store is None:
            files.close()
        return model, filled.store
    except BaseException as error:
        files.close()
        if options.sharding is not None:
            options.sharding.close()
        if is_out_of_memory(error):
            raise ConfigError(
                f"there is not enough memory to load {files.path} ({error}); set a smaller "
                "expert-memory, or use a machine with more."
            ) from None
        raise


def _check_kind(files: ModelFolder, kinds: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a folder of another kind of model."""
    kind = opener_of(files)
    if kind not in kinds:
        found, wanted = OPENERS[kind], OPENERS[kinds[0]]
        raise ConfigError(
            f"{files.path} has {found.what}, but {wanted.what} is needed here; give one, or use "
            f"{found.remedy} for this one."
        )


def pick_dtype(files: ModelFolder, name: str | torch.dtype | None) -> torch.dtype:
    """Return the asked type, or the folder's own."""
    stored = files.values.get("dtype") or files.values.get("torch_dtype") or "float32"
    if name is None and short_name(stored) not in DTYPES:
        raise ConfigError(
            f"{files.path / 'config.json'} has dtype {stored!r}, which is not offered; ask for one "
            f"of {spellings(DTYPES)}."
        )
    short = short_name(stored if name is None else name)
    if short not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; use one of {spellings(DTYPES)}.")
    return torch_dtype(short)
