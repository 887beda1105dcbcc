"""Open a model folder for inference, with all experts in memory or behind a store."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..dtypes import short_name, spellings, torch_dtype
from ..errors import ConfigError
from ..kernels.values.memory import is_out_of_memory
from ..moe.folders.adapters import adapter_table
from ..moe.folders.folder import ModelFolder
from ..moe.folders.generation_config import read_generation_config
from ..moe.folders.hub import local_folder
from ..moe.folders.marked_texts import MarkedTexts
from ..moe.folders.text_codec import TextCodec
from ..moe.models.correction import Correction
from ..moe.models.decoder import Decoder
from ..moe.models.encoder import Encoder
from ..moe.models.language_model import LanguageModel
from ..moe.models.sampling import GenerationConfig
from ..moe.models.text_classifier import TextClassifier
from ..moe.routers.own_code import allow
from .experts.options import StoreOptions
from .experts.policies.policy import Policy
from .experts.predictors.predictor import Predictor
from .experts.store import ExpertStore
from .filling import Filled, fill_model
from .load_checks import check_device, check_options

log = logging.getLogger(__name__)

DTYPES = ("fp32", "bf16")
"""What a model may be loaded as."""


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
    file of ``moeyard sparsity`` (``exact`` changes nothing); ``expert_fallback``, the same model in
    fewer bits, for missing experts up to ``expert_fallback_above``. ``expert_correction`` undoes
    that, all but for ``expert_correction_threshold``.

    Raises :class:`ModelFileError` for a folder that is damaged or of an unknown kind and for a
    model that cannot be downloaded, and :class:`ConfigError` for arguments that do not fit.
    """
    options = StoreOptions(
        policy=expert_policy,
        predictor=expert_predictor,
        reader=expert_reader,
        log=None if expert_log is None else Path(expert_log),
        sparsity=None if expert_sparsity is None else str(expert_sparsity),
        fallback=None if expert_fallback is None else Path(expert_fallback),
        fallback_above=expert_fallback_above,
        correction=expert_correction,
        correction_threshold=expert_correction_threshold,
    )
    how = (dtype, device, expert_memory, ignore_unused_weights, allow_code, options)
    model, _ = open_model(folder, *how)
    for name, path in (adapters or {}).items():
        model.adapters.load(name, Path(path))
    return model


def load_classifier(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
    ignore_unused_weights: bool = False,
    allow_code: str | Sequence[str] = (),
    options: StoreOptions | None = None,
) -> TextClassifier:
    """Open a folder with an encoder, such as BERT's or a run's export, as a model ready to call.

    The arguments are those of :func:`load`; ``options`` are those of the expert store. Raises
    what :func:`load` raises, and :class:`ConfigError` for a model of another kind.
    """
    how = (dtype, device, expert_memory, ignore_unused_weights, allow_code, options)
    model, _ = _open(folder, "encoder", *how)
    assert isinstance(model, TextClassifier), "its kind was asked for"
    return model


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
    how = (dtype, device, expert_memory, ignore_unused_weights, allow_code, options)
    model, store = _open(folder, "decoder", *how)
    assert isinstance(model, LanguageModel), "its kind was asked for"
    return model, store


def _open(
    folder: str | Path,
    kind: str,
    dtype: str | torch.dtype | None,
    device: str,
    expert_memory: str | None,
    ignore_unused_weights: bool,
    allow_code: str | Sequence[str],
    options: StoreOptions | None,
) -> tuple[LanguageModel | TextClassifier, ExpertStore | None]:
    """Open a model of ``kind``, and its store, if there is one."""
    target = check_device(device, expert_memory)
    allow(allow_code)
    options = options or StoreOptions()
    check_options(options, expert_memory, target)
    files = ModelFolder(local_folder(folder))
    try:
        _check_kind(files, kind)
        left_out = files.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        open_it = _OPENERS[files.config.kind]
        filled = fill_model(files, pick_dtype(files, dtype), expert_memory, options, target)
        model = open_it(files, filled, options)
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


def _check_kind(files: ModelFolder, kind: str) -> None:
    """Raise :class:`ConfigError` for a folder of another kind of model."""
    if files.config.kind != kind:
        remedy = {
            "decoder": "moeyard generate or moeyard.load",
            "encoder": "moeyard classify or moeyard.load_classifier",
        }
        raise ConfigError(
            f"{files.path} has a model of kind {files.config.kind}, but one of kind {kind} is "
            f"needed here; give one, or use {remedy[files.config.kind]} for this one."
        )


def _language_model(files: ModelFolder, filled: Filled, options: StoreOptions) -> LanguageModel:
    decoder = filled.model
    assert isinstance(decoder, Decoder), "its configuration is a decoder's"
    table = adapter_table(decoder, files.family)
    model = LanguageModel(decoder, _generation(files), TextCodec(files.path), table)
    if filled.fallback is not None and options.correction is not None:
        on = filled.fallback.on
        model.correction = Correction(options.correction, on, options.correction_threshold)
    return model


def _text_classifier(files: ModelFolder, filled: Filled, options: StoreOptions) -> TextClassifier:
    encoder = filled.model
    assert isinstance(encoder, Encoder), "its configuration is an encoder's"
    if options.correction is not None:
        raise ConfigError(
            f"expert-correction is {options.correction}, which checks generated tokens, but "
            f"{files.path} is a model of kind encoder; leave it out."
        )
    return TextClassifier(encoder, MarkedTexts(files.path))


_OPENERS: dict[
    str, Callable[[ModelFolder, Filled, StoreOptions], LanguageModel | TextClassifier]
] = {"decoder": _language_model, "encoder": _text_classifier}
"""By the kind of model."""


def _generation(files: ModelFolder) -> GenerationConfig:
    """Read how the model generates, and warn of what cannot be followed."""
    generation = read_generation_config(files)
    if generation.unknown_eos_ids:
        log.warning(
            "eos_token_id has %s, but ids go up to %d, so no answer ends there.",
            ", ".join(map(str, generation.unknown_eos_ids)),
            files.config.vocabulary - 1,
        )
    if generation.not_followed:
        log.warning(
            "generation_config.json asks for %s, which is not offered; answers do without.",
            " and ".join(generation.not_followed),
        )
    return generation


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
