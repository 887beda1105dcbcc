"""Dense to dynamic experts: fine-tune, cut, train routers, choose a threshold, write the folder.

Piorczynski et al. 2023 (DSTI) and Szatkowski et al. 2024 (D2DMoE, arXiv 2310.04361).
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...moe.config.model import decoder_config
from ...moe.folders.cut import CutWeights, check_cut, cluster_neurons, cut_config
from ...moe.folders.families.table import FAMILIES
from ...moe.folders.folder import ModelFolder
from ...moe.folders.generation_config import generation_to_keep
from ...moe.folders.hf_config import to_hf
from ...moe.folders.hub import local_folder
from ...moe.folders.text_codec import TextCodec
from ...moe.folders.tokenizer_folder import copy_tokenizer
from ...moe.folders.write_weights import plan_weights
from ...moe.folders.writer import write_model_folder
from ...moe.models.decoder import Decoder
from ...moe.routers.contribution import Contribution
from ..checkpoints.start_from import weights_identity
from ..stop import StopRequest
from ..work import LongWork
from .dense import DecoderTensors, gate_of, mlps, open_dense, reorder, round_weights, set_activation
from .fine_tune import fine_tune
from .measure import Row, choose, held_out_loss, lines_of, measure
from .regress import Routers, train_routers
from .settings import Settings
from .steps import Phase
from .text import Text
from .work_folder import WorkFolder, text_identity

log = logging.getLogger(__name__)

TABLE = "sparsify.json"
"""The file of the written folder with thresholds, their losses and their operations."""


@dataclass(frozen=True, slots=True)
class Sparsified:
    """What was found."""

    dense_loss: float
    """Held-out loss of the source, in nats per token."""
    router_error: float
    """Squared error of the routers over the mean square of the norms, at the end."""
    rows: list[Row]
    """The table: all experts first."""
    row: Row
    """The chosen threshold."""


def sparsify(
    source: str | Path,
    target: Path,
    data: Path,
    text: str,
    settings: Settings,
    stop: StopRequest | None = None,
    ignore_unused_weights: bool = False,
) -> Sparsified:
    """Write the dense model of ``source`` to ``target``, its MLPs cut into dynamic experts.

    ``text`` is the contents of ``data``. Its last tenth is held out, the rest is trained on. With
    all experts on, the written model is the dense one, after its fine-tuning. An interrupted call
    goes on where it was if it is repeated.

    Raises :class:`ConfigError` for a model that cannot be cut and for options that do not fit,
    :class:`DataError` for a text that is too short, and :class:`Stopped` after a stop request.
    """
    stop = stop or StopRequest()
    folder = ModelFolder(local_folder(source))
    try:
        check_cut(str(folder.path), decoder_config(folder.config), settings.experts)
        settings.check(folder.config.max_positions)
        left_out = folder.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        windows = Text(data, text, TextCodec(folder.path).tokenizer, settings)
        begun = settings.model_dump(mode="json", exclude={"tau", "tolerance", "eval_windows"})
        begun |= {"weights": weights_identity(folder.path), "text": text_identity(text)}
        work = WorkFolder(target, begun)
        decoder = open_dense(folder)
        dense_loss = held_out_loss(decoder, windows)
        _fine_tune(decoder, folder, windows, settings, work, stop)
        orders = _cut(decoder, settings, work, stop)
        reorder(decoder, orders)
        phase = Phase(
            "training routers",
            work.path / "routers.safetensors",
            settings.router_steps,
            settings.router_lr,
            stop,
        )
        routers, errors = train_routers(decoder, windows, settings, phase)
        rows = measure(decoder, windows, settings, routers)
        found = Sparsified(dense_loss, errors[-1], rows, choose(rows, settings))
        _write(folder, target, decoder, settings, routers, found)
    finally:
        folder.close()
    work.remove()
    return found


def _fine_tune(
    decoder: Decoder,
    folder: ModelFolder,
    text: Text,
    settings: Settings,
    work: WorkFolder,
    stop: StopRequest,
) -> None:
    """Fine-tune the model if that is asked for; its weights then are of the folder's type."""
    set_activation(decoder, settings.activation)
    if settings.steps:
        path = work.path / "fine-tuning.safetensors"
        phase = Phase("fine-tuning", path, settings.steps, settings.lr, stop)
        fine_tune(decoder, text, settings, phase)
        round_weights(decoder, folder.dtype)


def _cut(
    decoder: Decoder, settings: Settings, work: WorkFolder, stop: StopRequest
) -> dict[int, torch.Tensor]:
    """Return the order of each layer's neurons, expert after expert."""
    orders = {}
    layers = mlps(decoder)
    left = sum(work.order(layer) is None for layer in layers)
    with LongWork("cutting layers", stop, left) as progress:
        for layer, mlp in layers.items():
            order_F = work.order(layer)
            if order_F is None:
                order_F = cluster_neurons(gate_of(mlp).weight, settings.experts, settings.seed)
                work.save_order(layer, order_F)
                progress.advance()
            orders[layer] = order_F
    return orders


def _write(
    folder: ModelFolder,
    target: Path,
    decoder: Decoder,
    settings: Settings,
    routers: Routers,
    found: Sparsified,
) -> None:
    """Write the folder with the chosen threshold, and the table."""
    router = Contribution(
        rule=settings.rule,
        tau=found.row.tau,
        width=settings.router_width,
        k=lines_of(found.row),
    )
    config = cut_config(
        decoder_config(folder.config), settings.experts, settings.activation, router
    )
    dtype = folder.dtype
    values = to_hf(config, str(dtype).removeprefix("torch."), source=folder.values)
    weights = CutWeights(DecoderTensors(decoder), settings.experts, routers)
    table: dict[str, Any] = {"settings": settings.model_dump(mode="json"), **asdict(found)}

    def add_files(unfinished: Path) -> None:
        copy_tokenizer(folder.path, unfinished)
        (unfinished / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")

    family = FAMILIES[values["model_type"]]
    plans = plan_weights(config, family, weights, dtype, torch.float32)
    write_model_folder(target, values, plans, add_files, generation_to_keep(folder))
