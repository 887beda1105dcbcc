"""Open a model folder for inference, with all experts in memory or behind a store."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..dtypes import short_name, spellings, torch_dtype
from ..errors import ConfigError
from ..kernels.values.memory import is_out_of_memory
from ..moe.folders.adapters import adapter_table
from ..moe.folders.folder import ModelFolder
from ..moe.folders.generation_config import read_generation_config
from ..moe.folders.hub import local_folder
from ..moe.folders.read_weights import WeightRead, dense_reads, expert_reads, run_reads
from ..moe.folders.text_codec import TextCodec
from ..moe.models.correction import Correction
from ..moe.models.decoder import Decoder
from ..moe.models.language_model import LanguageModel
from ..moe.models.sampling import GenerationConfig
from ..moe.routers.own_code import allow
from ..moe.without_memory import without_memory
from .experts.budget import budget_bytes
from .experts.copies import copies_bytes, open_fallback
from .experts.fallback import Fallback
from .experts.forwards import announce_forwards
from .experts.offloaded import OffloadedExperts
from .experts.opening import open_store
from .experts.options import StoreOptions
from .experts.policies.policy import Policy
from .experts.predictors.predictor import Predictor
from .experts.predictors.table import facts_of, open_predictor
from .experts.sparsity import Sparsity, open_sparsity, owner_of
from .experts.store import ExpertStore
from .load_checks import check_device, check_options
from .memory import available_bytes, check_memory
from .planning.budget import Demand
from .planning.decide import decide
from .planning.start import log_start
from .resident import resident_experts

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


def open_model(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
    ignore_unused_weights: bool = False,
    allow_code: str | Sequence[str] = (),
    options: StoreOptions | None = None,
) -> tuple[LanguageModel, ExpertStore | None]:
    """Do what :func:`load` does and return the store too, if there is one."""
    target = check_device(device, expert_memory)
    allow(allow_code)
    options = options or StoreOptions()
    check_options(options, expert_memory, target)
    files = ModelFolder(local_folder(folder))
    try:
        left_out = files.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        model, store = _open(files, dtype, expert_memory, options)
        if target.type != "cpu":
            model.decoder.to(target)
        return model, store
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


def _open(
    files: ModelFolder,
    dtype: str | torch.dtype | None,
    expert_memory: str | None,
    options: StoreOptions,
) -> tuple[LanguageModel, ExpertStore | None]:
    chosen = pick_dtype(files, dtype)
    asked = expert_memory
    copies = copies_bytes(options, chosen)
    demand = Demand(copies_bytes=copies)
    expert_memory, room = decide(files, chosen, asked, demand, options.reader)
    sharding = options.sharding
    if sharding is not None:
        expert_memory = sharding.start(files, chosen, expert_memory)
    if expert_memory is None:  # nothing is ever missing
        options, copies = options.without_copies(), 0
    check_memory(files, chosen, expert_memory, copies_bytes=copies)
    with without_memory():
        decoder = Decoder(files.config, expert_ids=())
    store, fallback, sparsity = None, None, open_sparsity(files, options.sparsity)
    if expert_memory is not None:
        num_bytes = budget_bytes(files, chosen, expert_memory)
        store = open_store(files, chosen, num_bytes, options=options, free_bytes=available_bytes())
        announce_forwards(decoder, store.begin)
        fallback = open_fallback(store, files, chosen, options)
    reads = _attach_experts(files, decoder, chosen, store, sparsity, fallback)
    run_reads(files, [*dense_reads(files, decoder, chosen), *reads])
    if sharding is not None and store is not None:
        sharding.attach(decoder, store, files, chosen)
    if sparsity is not None and sparsity.score is not None:
        sparsity.check_owner(owner_of(decoder))
    if store is not None:
        predictor = open_predictor(options.predictor, decoder)
        if predictor is not None:
            store.predict(predictor, facts_of(files.config))
    if asked is not None:
        slots = None if store is None else store.pools.num_slots
        plan = None if store is None else store.read_plan
        log_start(files, chosen, slots, plan, options, room)
    generation = _generation(files)
    table = adapter_table(decoder, files.family)
    model = LanguageModel(decoder, generation, TextCodec(files.path), table)
    if fallback is not None and options.correction is not None:
        model.correction = Correction(options.correction, fallback.on, options.correction_threshold)
    if store is None:
        files.close()
    return model, store


def _attach_experts(
    files: ModelFolder,
    decoder: Decoder,
    dtype: torch.dtype,
    store: ExpertStore | None,
    sparsity: Sparsity | None,
    fallback: Fallback | None,
) -> list[WeightRead]:
    """Give every MoE layer its experts, and return the reads that fill those in memory."""
    reads: list[WeightRead] = []
    moe_layers = decoder.moe_layers()
    for index, layer in moe_layers:
        limits = None
        if sparsity is not None:
            limits = sparsity.limits(index, layer.d_model, layer.d_expert)
        if store is not None:
            where = (index, layer.num_experts, len(moe_layers))
            layer.experts = OffloadedExperts(store, *where, limits, fallback)
        else:
            layer.experts, views = resident_experts(files, index, dtype, sparsity, limits)
            reads += expert_reads(files, index, views)
    return reads


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
