"""Our balance loss beside transformers', which is k times ours where a model has one MoE layer.

Over several layers transformers pools counts and probabilities before it multiplies them; ours is
the mean of the layers' losses. The pooled value follows from the same counts and sums.
"""

import pytest
import torch

from moeyard.configuration import validate_config
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.decoder import Decoder
from moeyard.moe.losses import auxiliary_losses
from moeyard.training.config import RunConfig
from moeyard.training.start_from import read_start

from hf_families import CASES, save

WITH_LOSS = [case for case in CASES if case.startswith(("mixtral", "qwen2_moe", "qwen3_moe"))]
WITH_LOSS += ["olmoe", "gpt_oss"]


def trained_by_us(folder) -> Decoder:
    values = {"run_dir": "unused", "start_from": str(folder), "train": {"steps": 1}}
    values["train"]["sequence_length"] = 32
    decoder = Decoder(validate_config(RunConfig, values).model)
    read_start(str(folder), decoder)
    return decoder.train()


@pytest.mark.parametrize("case", WITH_LOSS)
def test_the_balance_loss_is_that_of_transformers(tmp_path, case):
    theirs = save(case, tmp_path / "m")
    ids = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids, labels=ids, output_router_logits=True)
    decoder = trained_by_us(tmp_path / "m")
    routings = decoder(batch_of_rows(ids)).routings
    k, num_experts = decoder.routers()[0].k, decoder.routers()[0].num_experts
    rows = ids.numel() * len(routings)
    counts_E = torch.stack([routing.counts_E for routing in routings]).sum(0) / rows
    sums_E = torch.stack([routing.probability_sums_E for routing in routings]).sum(0) / rows
    pooled = num_experts * (counts_E * sums_E).sum()
    assert float(pooled) == pytest.approx(float(expected.aux_loss), rel=1e-5)
    ours = auxiliary_losses(routings, decoder.routers(), lambda t: t)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [
        float(load_balancing_loss_func((logits,), num_experts, k)) / k
        for logits in expected.router_logits
    ]
    assert float(ours.balance) == pytest.approx(sum(layers) / len(layers), rel=1e-5)
    coefficient = theirs.config.router_aux_loss_coef
    assert decoder.routers()[0].config.balance_loss == pytest.approx(k * coefficient)
