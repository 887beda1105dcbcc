"""Does the balance loss of a model folder equal transformers', for any number of layers?

    python benchmarks/balance_loss.py

Small random models of each family that has such a loss. The value is what each adds to the training
loss; the gradient is that of the term on all parameters of all routers, as one vector. Both
directions: "read" is a folder of transformers that a run starts from, "written" is a folder of ours
that transformers opens.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

from moeyard.moe.batch import batch_of_rows
from moeyard.moe.folders.convert import convert
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.training.checkpoints.start_from import read_start
from moeyard.training.read_config import complete_run_config

from report import write_results

SIZES = {
    "vocab_size": 96,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
}
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "intermediate_size": 24}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 10}),
    "olmoe": ("Olmoe", {"num_experts": 6, "intermediate_size": 24}),
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "intermediate_size": 24, "head_dim": 10}),
}
IDS = torch.randint(0, 96, (3, 32), generator=torch.Generator().manual_seed(0))


def theirs(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the term of a folder's model in transformers and its gradient."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    output = model(IDS, labels=IDS, output_router_logits=True)
    routers = [
        parameter
        for name, parameter in model.named_parameters()
        if ".mlp.gate." in name or ".mlp.router." in name
    ]
    return _with_gradient(model.config.router_aux_loss_coef * output.aux_loss, routers)


def ours(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the term of a run that starts from a folder and its gradient."""
    train = {"steps": 1, "sequence_length": 32}
    values = {"run_dir": "unused", "start_from": str(folder), "train": train}
    decoder = Decoder(complete_run_config(values).model)
    read_start(str(folder), decoder)
    routings = decoder.train()(batch_of_rows(IDS)).routings
    losses = auxiliary_losses(routings, decoder.routers(), lambda counts: counts)
    routers = [parameter for router in decoder.routers() for parameter in router.parameters()]
    return _with_gradient(losses.total, routers)


def _with_gradient(term: Tensor, parameters: list[torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
    gradients = torch.autograd.grad(term, parameters)
    in_order = sorted(gradients, key=lambda part: part.ndim)  # biases of all, weights of all
    return term.detach(), torch.cat([part.flatten() for part in in_order])


def _compared(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    difference = (found[1] - expected[1]).norm() / expected[1].norm()
    return {
        "value_ratio": float(found[0] / expected[0]),
        "gradient_norm_ratio": float(found[1].norm() / expected[1].norm()),
        "gradient_difference": float(difference),
    }


def main() -> int:
    """Print the table and write the figures; return 1 if one is off."""
    transformers.utils.logging.disable_progress_bar()
    rows = []
    sys.stdout.write("family     layers way      value ratio  gradient ratio  |difference|\n")
    for family, (name, own) in FAMILIES.items():
        for num_layers in (1, 2, 4, 8):
            torch.manual_seed(1)
            options = SIZES | own | {"num_hidden_layers": num_layers}
            config = getattr(transformers, f"{name}Config")(**options)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
            with tempfile.TemporaryDirectory() as place:
                source, again = Path(place, "source"), Path(place, "again")
                model.save_pretrained(source)
                convert(source, again)
                pairs = {
                    "read": (ours(source), theirs(source)),
                    "written": (ours(source), theirs(again)),
                }
            for way, (found, expected) in pairs.items():
                figures = _compared(found, expected)
                rows.append({"family": family, "layers": num_layers, "way": way} | figures)
                value, gradient, difference = figures.values()
                sys.stdout.write(
                    f"{family:10} {num_layers:6} {way:8} {value:11.7f} {gradient:15.7f} "
                    f"{difference:13.1e}\n"
                )
                sys.stdout.flush()
    write_results("balance_loss", {"rows": rows})
    worst = max(max(abs(row["value_ratio"] - 1), row["gradient_difference"]) for row in rows)
    sys.stdout.write(f"largest departure {worst:.1e}\n")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
