"""Print where the host would wait for a GPU, as JSON: label -> [what, where] of each wait.

No GPU is needed. Tensors have no values (FakeTensorMode) and say that they are on a device that
Python registers. Copies that block, and reads of values, are seen as torch dispatches them. Of
Triton's operators the fake versions run.
"""

import contextlib
import json
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "fgpu"
ROOT = str(Path(__file__).resolve().parent.parent.parent)
READS = ("nonzero.default", "_local_scalar_dense", "masked_select", "repeat_interleave.Tensor")

_setup_privateuseone_for_python_backend(GPU)
getattr(torch, GPU).get_amp_supported_dtype = lambda: [torch.bfloat16]
FakeTensor.is_cuda = property(lambda tensor: tensor.device.type == GPU)
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.device = lambda device: contextlib.nullcontext()

from moeyard.kernels import experts as door  # noqa: E402
from moeyard.kernels import trust  # noqa: E402
from moeyard.kernels.gpu import choice, device  # noqa: E402
from moeyard.moe.config.model import ModelConfig  # noqa: E402
from moeyard.moe.models import generation  # noqa: E402
from moeyard.moe.models.decoder import Decoder  # noqa: E402
from moeyard.moe.models.sampling import SamplingParams  # noqa: E402
from moeyard.moe.routers.losses import auxiliary_losses, on_host  # noqa: E402
from moeyard.parallel.experts import all_to_all  # noqa: E402
from moeyard.parallel.experts.exchange import Splits  # noqa: E402
from moeyard.parallel.mesh import Mesh  # noqa: E402
from moeyard.training.objectives.next_token import NextToken  # noqa: E402

door.AUTOMATIC[GPU] = door.AUTOMATIC["cuda"]
for module in (choice, device):
    module.why_not = lambda device: None
trust.triton_computes = lambda *kind: True
trust.triton_router_computes = lambda device: True
torch._assert_async = lambda *arguments: None


class Waits(TorchDispatchMode):
    """Keeps each operator for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        ins, outs = (
            {x.device.type for x in tree_leaves(part) if isinstance(x, torch.Tensor)}
            for part in ((args, kwargs), out)
        )
        options = kwargs or {}
        blocks = not (
            options.get("non_blocking") or (name == "copy_.default" and args[2:] == (True,))
        )
        is_copy = name.startswith(("_to_copy.", "copy_.", "to."))  # "to" in inference mode
        moves = is_copy and len(ins | outs) > 1
        if (moves and blocks) or (name.startswith(READS) and GPU in ins):
            self.note(f"{name} {'+'.join(sorted(ins))}->{'+'.join(sorted(outs))}")
        return out

    def note(self, what):
        frames = [
            f"{Path(f.filename).relative_to(ROOT)}:{f.name}"
            for f in traceback.extract_stack()
            if f.filename.startswith(ROOT) and ".venv" not in f.filename and f.filename != __file__
        ]
        self.found.append([what, frames[-1] if frames else "outside"])


def build(router, **more):
    values = {
        "vocab_size": 96,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 64,
        "max_positions": 128,
        "moe": {"num_experts": 8, "d_expert": 32, "router": router},
    }
    config = ModelConfig.model_validate(values | more)
    with torch.device(GPU):
        decoder = Decoder(config)
    for name, buffer in list(decoder.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        decoder.get_submodule(owner)._buffers[leaf] = buffer.to(GPU)
    return decoder


def train(waits, decoder):
    """Run a micro-batch forward and backward, and what follows it in a step."""
    decoder.train()
    objective = NextToken(decoder)
    for _ in "ab":  # the first one may fill caches
        waits.found.clear()
        output = objective(torch.zeros(2, 33, dtype=torch.int64))
        auxiliary = auxiliary_losses(output.routings, decoder.routers(), lambda counts: counts)
        (output.loss_sum / 10 + auxiliary.total).backward()
        counts = on_host(auxiliary.counts)
        for router, own in zip(decoder.routers(), counts, strict=True):
            router.after_step(own, counts)


class Loopback:
    """The exchange of a group of one rank."""

    def splits(self, send_CP):
        return [Splits([counts]) for counts in send_CP]

    def rows(self, columns, splits, order=None):
        return [[column if order is None else column[order]] for column in columns]


def train_with_rows_that_travel(waits, decoder):
    """The same, with a path that tells other ranks how many rows it sends."""

    def numbers(*counts):
        waits.note("to_host")
        return [[64], [128]]  # rows and choices of 2 windows of 32 tokens

    all_to_all.to_host = numbers
    path = all_to_all.AllToAllPath(8, Mesh(), Loopback())
    for _, layer in decoder.moe_layers():
        layer.path = path
    train(waits, decoder)


def decode(waits, decoder):
    """Generate a prompt's first token, and count from the second one on."""
    decoder.eval()
    generation.sample = lambda logits, sampling, generator: 1
    limits = generation.GenerationLimits(3, SamplingParams(temperature=0), seed=0)
    rows = [torch.zeros(7, dtype=torch.int64, device=GPU) for _ in "ab"]
    steps = generation.continue_rows(decoder, rows, limits)
    next(steps)
    waits.found.clear()
    next(steps)


TOPK = {"kind": "topk", "k": 2, "balance_loss": 0.01, "z_loss": 0.001}
BALANCED = {
    "kind": "topk",
    "k": 2,
    "score": "sigmoid",
    "num_groups": 4,
    "top_groups": 2,
    "bias_update_rate": 1e-3,
    "sequence_balance_loss": 1e-3,
}
WINDOWED = {"attention": {"window": 8, "sinks": True}}
CASES = {
    "train topk": (train, TOPK, {}),
    "train sequence balance, bias and groups": (train, BALANCED, {}),
    "train windows and sinks": (train, TOPK, WINDOWED),
    "train with rows that travel": (train_with_rows_that_travel, TOPK, {}),
    "decode": (decode, TOPK, {}),
}


def main():
    found = {}
    for label, (run, router, more) in CASES.items():
        waits = Waits()
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            run(waits, build(router, **more))
        found[label] = list(waits.found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
