"""A model of series whose forecasts a test can work out: the last period again."""

from typing import Literal

import torch

from moeyard.moe.config.model import LayersConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.layer import MoELayer
from moeyard.moe.models.model import ModelOutput
from moeyard.moe.models.series_model import SeriesForecast, SeriesLoss, SeriesModel
from moeyard.moe.routers.topk import TopK

PERIOD = 4
LONGEST = 64


class SeasonalConfig(LayersConfig):
    kind: Literal["seasonal"] = "seasonal"

    @property
    def generates(self):
        return False

    @property
    def reads_tokens(self):
        return False


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = MoELayer(d_model=4, d_expert=3, num_experts=5, router=TopK(k=2))


class Seasonal(SeriesModel):
    """Repeats the last :data:`PERIOD` points. Quantiles are apart by the deviation of the context.

    Its experts are run and change nothing, so that their load can be seen.
    """

    def __init__(self, quantiles=True):
        moe = MoEConfig(num_experts=5, d_expert=3, router=TopK(k=2))
        shape = {"d_model": 4, "num_layers": 1, "num_heads": 1, "max_positions": LONGEST}
        super().__init__(SeasonalConfig(moe=moe, **shape))
        self.layers = torch.nn.ModuleList([Block()])
        self.forecasts_quantiles = quantiles
        self.batches = []
        """The shape of every call."""

    def forward(self, values_TD):
        hidden_TD, routing = self.layers[0].mlp(values_TD)
        return ModelOutput(hidden_TD, [routing])

    def score(self, values_BL, observed_BL):
        return SeriesLoss(values_BL.sum(), self.num_targets(values_BL, observed_BL), [])

    def num_targets(self, values_BL, observed_BL):
        return int(observed_BL.sum())

    def predict(self, values_BL, observed_BL, horizon, quantiles=(), seed=0):
        assert torch.isfinite(values_BL).all() and observed_BL.dtype is torch.bool
        self.batches.append((*values_BL.shape, horizon, seed))
        self(values_BL.float().flatten().repeat(4, 1).T)
        places = [values_BL.shape[1] - PERIOD + step % PERIOD for step in range(horizon)]
        mean_BH = values_BL[:, places].float()
        if not self.forecasts_quantiles:
            return SeriesForecast(mean_BH, None)
        spread_B1Q = values_BL.std(dim=1)[:, None, None] * (torch.tensor(quantiles) - 0.5)
        return SeriesForecast(mean_BH, (mean_BH[..., None] + spread_B1Q).float())
