"""Steps of Adam over some parameters, saved now and then, so that a killed command goes on.

The windows of a step depend on the seed and the step alone. So a resumed phase ends with the bits
of an unbroken one.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, Stopped, TrainingError
from ...files import replaced
from ...progress import Progress
from ..optimizers.adamw import AdamWConfig
from ..schedule import learning_rate
from ..stop import StopRequest

SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One of the two trainings of ``moeyard sparsify``."""

    name: str
    """Shown in the progress."""
    path: Path
    """The file of its saves."""
    steps: int
    lr: float
    stop: StopRequest


def run_phase(
    phase: Phase, parameters: Mapping[str, Tensor], loss_of: Callable[[int], Tensor]
) -> list[float]:
    """Minimise ``loss_of(step)`` by Adam and return the loss of each step.

    The rate rises over a tenth of the steps and falls to 0 along a cosine, without weight decay.
    Goes on after the last save, if there is one. Raises :class:`Stopped` after a stop request, with
    the state saved, and :class:`TrainingError` for a loss that is not finite.
    """
    named = dict(parameters)
    optimizer = torch.optim.Adam(named.values(), phase.lr, (0.9, 0.95))
    rate = AdamWConfig(lr=phase.lr, warmup_steps=phase.steps // 10, min_lr_ratio=0.0)
    losses = _restore(phase, named, optimizer)
    saved_at = time.monotonic()
    with Progress(phase.name, phase.steps) as progress:
        progress.advance(len(losses))
        for step in range(len(losses), phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(rate, step, phase.steps)
            losses.append(_step(phase, optimizer, named, loss_of, step))
            progress.advance()
            is_last, is_stopped = step + 1 == phase.steps, phase.stop.signal_name is not None
            if is_last or is_stopped or time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(phase, named, optimizer, losses)
                saved_at = time.monotonic()
            if is_stopped and not is_last:
                raise Stopped(
                    f"stopped by {phase.stop.signal_name} after step {step + 1} of {phase.steps} "
                    f"of {phase.name}; the same command goes on from there."
                )
    return losses


def _step(
    phase: Phase,
    optimizer: torch.optim.Adam,
    named: Mapping[str, Tensor],
    loss_of: Callable[[int], Tensor],
    step: int,
) -> float:
    optimizer.zero_grad()
    loss = loss_of(step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
    optimizer.step()
    found = float(loss.detach())
    if found != found or found in (float("inf"), float("-inf")):
        raise TrainingError(
            f"the loss of step {step} of {phase.name} is {found}; use a smaller learning rate."
        )
    return found


def _save(
    phase: Phase, named: Mapping[str, Tensor], optimizer: torch.optim.Adam, losses: list[float]
) -> None:
    tensors = {}
    for name, value in named.items():
        state = optimizer.state[value]
        tensors[f"value/{name}"] = value.detach()
        tensors |= {f"{kind}/{name}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
    with replaced(phase.path) as unfinished:
        save_file(tensors, unfinished, {"losses": json.dumps(losses)})


@torch.no_grad()
def _restore(phase: Phase, named: Mapping[str, Tensor], optimizer: torch.optim.Adam) -> list[float]:
    """Fill parameters and optimizer from the last save; return the losses up to it."""
    if not phase.path.exists():
        return []
    try:
        with safe_open(phase.path, "pt") as file:
            losses: list[float] = json.loads(file.metadata()["losses"])
            for name, value in named.items():
                value.copy_(file.get_tensor(f"value/{name}"))
                optimizer.state[value] = {
                    "step": torch.tensor(float(len(losses))),
                    "exp_avg": file.get_tensor(f"exp_avg/{name}"),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}"),
                }
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{phase.path} cannot be read ({error}); remove it to begin this phase again."
        ) from None
    return losses
