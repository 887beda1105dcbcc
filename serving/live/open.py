"""From a model folder and the folder of its run's updates to a follower."""

from pathlib import Path

from ...moe.folders.folder import ModelFolder
from ...moe.folders.hub import local_folder
from ...moe.models.decoder import Decoder
from ...moe.updates.folder import UpdatesFolder
from ..engine.thread import EngineThread
from ..experts.store import ExpertStore
from ..experts.tiers.live import LiveTier
from .follow import Follower
from .metrics import LiveMetrics
from .weights import LiveWeights


def follow(
    model: str,
    updates: str,
    decoder: Decoder,
    thread: EngineThread,
    store: ExpertStore | None = None,
    tier: LiveTier | None = None,
) -> Follower:
    """Bring the model of ``thread`` to the newest version, and keep it there until closed."""
    folder = ModelFolder(local_folder(model))
    folder.close()
    weights = LiveWeights(folder, decoder, store, tier)
    metrics = LiveMetrics(thread.engine.metrics.registry)
    found = Follower(UpdatesFolder(Path(updates)), weights, thread.exchange_weights, metrics)
    found.look()
    found.start()
    return found
