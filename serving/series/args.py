"""What a server of forecasts takes of a server's arguments, and its checks."""

from dataclasses import replace
from pathlib import Path

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from ...moe.folders.hub import local_folder
from ...moe.routers.own_code import allow
from ..experts.budget import bytes_of_experts, host_bytes
from ..experts.copies import check_fallback
from ..experts.predictors.table import check_fit
from ..experts.tiers.shared_memory import check_shared_memory
from ..load_checks import check_options
from ..loading import pick_dtype
from ..memory import check_memory
from ..replica_files import check_replica_files
from ..serve_args import ServeArgs

OF_TEXT = (
    "kv_dtype",
    "no_prefix_reuse",
    "max_model_len",
    "prefill_chunk",
    "speculative",
    "speculative_rows",
    "prefix_routing",
    "chat_template",
    "lora",
    "allow_lora_updates",
    "record_routes",
    "follow",
    "expert_parallel",
    "expert_placement",
)
"""Arguments that mean nothing to a model of series, or are not there for one."""


def refuse_text_arguments(args: ServeArgs) -> None:
    """Raise :class:`ConfigError` for an argument of :data:`OF_TEXT` that is set."""
    for name in OF_TEXT:
        value = getattr(args, name)
        if value != ServeArgs.model_fields[name].get_default(call_default_factory=True):
            raise ConfigError(
                f"{name.replace('_', '-')} is {value!r}, which servers of models of time series do "
                "not have; leave it out."
            )


def check_series_model(args: ServeArgs, runs_here: bool = False) -> None:
    """Refuse a folder or a budget that cannot work; reads headers only.

    ``runs_here`` says that the replicas run on this machine, whose memory must hold the model.
    """
    allow(args.allow_code)
    refuse_text_arguments(args)
    folder = ModelFolder(local_folder(args.model))
    folder.check(ignore_unused_weights=args.ignore_unused_weights)
    dtype = pick_dtype(folder, args.dtype)
    check_replica_files(folder.config, None, args.expert_log, args.expert_memory)
    log = None if args.expert_log is None else Path(args.expert_log)
    check_options(replace(args.store_options, log=log), args.expert_memory)
    copies = check_fallback(folder, args.store_options, dtype)
    if args.expert_memory is not None:
        check_fit(args.expert_predictor, folder.config)
    bytes_of_experts(folder, dtype, args.expert_memory)
    host = host_bytes(folder, dtype, args.host_memory)
    if runs_here:
        check_memory(folder, dtype, args.expert_memory, args.most_replicas, host, copies)
        check_shared_memory(host)
    folder.close()
