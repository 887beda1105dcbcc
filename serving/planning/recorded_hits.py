"""How many experts would have been in memory, on recorded routes."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ...moe.config.model import LayersConfig
from ...moe.routes.identity import identity_of
from ...moe.routes.reader import route_files
from ..experts.policies.policy import CacheFacts
from ..experts.policies.table import open_policy
from ..experts.pools import Pools
from ..experts.recorded import RecordedForward, read_forwards
from ..experts.replay.run import replay


class RecordedHits:
    """Route files of one model, replayed with any number of slots."""

    def __init__(self, paths: Sequence[Path], config: LayersConfig, policy: str) -> None:
        assert config.moe is not None, "only MoE models have routes"
        files = route_files(paths)
        self._config, self._num_experts, self._policy = config, config.moe.num_experts, policy
        self._architecture = identity_of(config).architecture
        for file in files:
            if file.header.model.architecture != self._architecture:
                raise ConfigError(
                    f"{file.path} has routes of another model (architecture "
                    f"{file.header.model.architecture}, this one's is {self._architecture}); "
                    "record routes of this one with --record-routes."
                )
        self._forwards: list[RecordedForward] = read_forwards(files)

    def hit_rate(self, pools: Pools) -> float:
        """Return the share of needed experts that were in a slot, reading on demand."""
        facts = CacheFacts(
            *(tuple(self._config.moe_layers), self._num_experts, sum(pools.num_slots)),
            self._architecture,
        )
        counters = replay(self._forwards, facts, open_policy(self._policy, facts), pools=pools)
        return counters.hits / max(1, counters.hits + counters.waits)
