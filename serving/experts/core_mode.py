"""Let a decoder's answers use core channels of experts (moe/experts/core_channels.py)."""

from ...errors import ConfigError
from ...moe.experts.core_channels import CoreMode
from ...moe.models.decoder import Decoder
from ...moe.models.model import Model
from ...moe.routers.averaged import AveragedConfig
from .sparsity import Sparsity


def use_core_channels(model: Model, sparsity: Sparsity | None) -> None:
    """Do so if ``sparsity`` is of that kind, before the model has its weights.

    Raises :class:`ConfigError` for models that do not generate texts, and for routers whose choices
    are computed in another way than expert by expert and row by row.
    """
    if sparsity is None or sparsity.score != "coreinfer":
        return
    name = f"expert-sparsity is 'coreinfer:{sparsity.target:g}'"
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"{name}, but the model does not answer prompts, which decide about channels; leave it "
            "out."
        )
    for router in model.routers():
        if router.config.varies or isinstance(router.config, AveragedConfig):
            raise ConfigError(
                f"{name}, but the router {router.config.kind} does not choose k experts for each "
                "token; use a score with thresholds, such as cats, or leave it out."
            )
    moe = model.config.moe
    assert moe is not None, "open_sparsity refuses models without experts"
    model.core = CoreMode(1 - sparsity.target, moe.num_experts, moe.d_expert)
