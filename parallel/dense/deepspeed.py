"""Dense parameters under DeepSpeed's ZeRO, with the gradients, norm and optimizer of all engines.

DeepSpeed sums dense gradients, splits them (stage 2), the optimizer's part of the work (1) and the
weights (3), offloads, and gathers. It calls an optimizer of ours, which sees each rank's flat part
with its gradient (deepspeed_view.py). There the norm is taken over all parameters, each counted
once, and the run's own optimizer updates dense parts and experts together. Its masters and moments
are views of the flat part or of the same shape. So DeepSpeed neither clips nor updates.

Experts and routers are hidden from it, for the reasons in fsdp.py. DeepSpeed averages over ranks;
gradients here are sums, so what it hands over is multiplied by the number of ranks.

Of DeepSpeed only documented calls are used: ``initialize``, the engine's ``forward``, ``backward``,
``step`` and ``set_gradient_accumulation_boundary``, ``zero.GatheredParameters`` and
``utils.safe_get_local_fp32_param``. Where numbers lie is computed in zero_layout.py and compared
with what DeepSpeed did at the start. Tested with gloo on CPUs, not yet with NCCL.
"""

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..mesh import Mesh
from ..watch.pulse import pulse
from .deepspeed_view import DenseView, HandOver, ThroughDeepSpeed
from .engine import Clip, Optimizer
from .flat_part import FlatPart
from .fsdp import modules_kept_whole
from .gradient_queue import GradientQueue
from .gradients import MainGradients
from .local_part import flat_part
from .part_gradients import ZeroMainGradients
from .zero_layout import Place, places

LARGEST_BUCKET = 500_000_000
"""DeepSpeed's own default, in numbers. It allocates the whole, however small the model."""


class Zero:
    """See :class:`~moeyard.parallel.dense.engine.DenseEngine`; needs a process group.

    ``settings`` is DeepSpeed's configuration, complete (training/deepspeed_settings.py).
    """

    gradients: MainGradients

    def __init__(self, mesh: Mesh, settings: Mapping[str, Any]) -> None:
        assert mesh.dp_group is not None, "one process has nothing to split"
        self._mesh, self._group = mesh, mesh.dp_group
        self._settings = settings
        self._zero: Mapping[str, Any] = settings["zero_optimization"]
        self._stage: int = self._zero["stage"]
        self.queue: GradientQueue | None = None
        self._held: list[nn.Parameter] = []
        """The dense parameters that DeepSpeed has."""
        self._places: list[Place] = []
        self._is_checked = self._stage != 3

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move experts and routers; DeepSpeed moves the rest."""
        for module in modules_kept_whole(model):
            module.to(device)

    def own_masters(self, model: nn.Module) -> Set[str]:
        """Return the parameters that ZeRO splits: DeepSpeed casts them and keeps fp32 parts."""
        if self._stage == 0:
            return frozenset()
        whole = _parameters_of(modules_kept_whole(model))
        return frozenset(name for name, p in model.named_parameters() if p not in whole)

    def wrap(
        self, objective: nn.Module, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """Give DeepSpeed the dense parameters, and note which numbers of each are this rank's."""
        hidden = modules_kept_whole(model)
        whole = _parameters_of(hidden)
        self._held = [p for p in model.parameters() if p.requires_grad and p not in whole]
        if self._stage > 0:
            numels = [parameter.numel() for parameter in self._held]
            self._places = places(self._stage, numels, self._mesh.world_size, self._mesh.rank)
            self._attach_parts(torch.device("cpu") if self._is_offloaded else device)
        self._module = import_deepspeed(device)
        self._hand_over = HandOver(self._held)
        view = DenseView(objective, hidden)
        self._engine = self._initialize(view)
        self._engine.set_gradient_accumulation_boundary(True)
        self._check_weights(dtype)
        self.gradients = ZeroMainGradients(model, self._mesh, self._held, self._stage > 0)
        return ThroughDeepSpeed(self._engine, view)

    @contextmanager
    def _boundary(self, is_boundary: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def accumulating(self) -> AbstractContextManager[object]:
        """Tell DeepSpeed that more micro-batches follow; stages 2 and 3 reduce each of them."""
        return self._boundary(False)

    def backward(self, loss: Tensor) -> None:
        """Run backward, which reduces dense gradients; then collect the others."""
        self._engine.backward(loss)
        self.gradients.accumulate()

    def step(self, optimizer: Optimizer, lr: float, clip: Clip) -> None:
        """Let DeepSpeed hand over its parts, update everything, and let it gather the weights."""

        def update(given: Sequence[Tensor]) -> None:
            self._take(given)
            self.gradients.scale_(clip(self.gradients.norm()))
            optimizer.step(lr)

        self._hand_over.next_to(update)
        with pulse.in_collective("the update of dense parameters"):
            self._engine.step()
        if self._hand_over.is_waiting:  # DeepSpeed skips a step whose gradients are not finite
            clip(torch.tensor(float("nan"), dtype=torch.float64))
            raise AssertionError("DeepSpeed updated nothing, and the gradients are finite")

    @property
    def _is_offloaded(self) -> bool:
        offload: Mapping[str, Any] = self._zero.get("offload_optimizer", {})
        return offload.get("device", "none") != "none"

    def _attach_parts(self, device: torch.device) -> None:
        """Copy this rank's numbers of each parameter, in fp32, to where they are updated."""
        for parameter, place in zip(self._held, self._places, strict=True):
            numbers = parameter.data.reshape(-1)[place.start : place.stop]
            parameter.flat_part = FlatPart(  # type: ignore[attr-defined]
                tuple(parameter.shape),
                place.start,
                numbers.to(device, torch.float32, copy=True),
                self._group,
                partial(self._put, parameter),
            )

    def _put(self, parameter: nn.Parameter, whole: Tensor) -> None:
        with self._module.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)

    def _initialize(self, view: DenseView) -> Any:
        """Return DeepSpeed's engine."""
        numel = sum(parameter.numel() for parameter in self._held)
        bucket = {"reduce_bucket_size": min(LARGEST_BUCKET, numel)}
        settings = {**self._settings, "zero_optimization": bucket | dict(self._zero)}
        try:
            made = self._module.initialize(model=view, optimizer=self._hand_over, config=settings)
        except (ValueError, AssertionError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"parallel.deepspeed is not as DeepSpeed {self._module.__version__} wants it "
                f"({reason}); correct parallel.deepspeed or the file that it names."
            ) from error
        return made[0]

    def _check_weights(self, dtype: torch.dtype) -> None:
        """Compare DeepSpeed's parts of the initial weights with those of zero_layout.py."""
        if self._stage == 0:
            return
        for parameter, place in zip(self._held, self._places, strict=True):
            if self._stage == 3:
                found = self._module.utils.safe_get_local_fp32_param(parameter)
                found = found[: place.stop - place.start]
            else:
                found = _room(self._hand_over.given()[0], place)
            part = flat_part(parameter)
            assert part is not None
            self._compare(part.local.to(dtype), found)

    def _compare(self, expected: Tensor, found: Tensor) -> None:
        found = found.detach().to(expected.device, expected.dtype)
        if not torch.equal(found, expected):
            raise ConfigError(
                f"parallel.dense is deepspeed, but DeepSpeed {self._module.__version__} splits "
                "parameters in another way than the versions that moeyard knows; install one with "
                "pip install 'moeyard[deepspeed]'."
            )

    def _take(self, given: Sequence[Tensor]) -> None:
        """Point main gradients, and at first masters, to what DeepSpeed hands over."""
        ranks = self._mesh.world_size
        if self._stage == 0:
            for parameter in self._held:
                assert parameter.grad is not None, "DeepSpeed fills in zeros"
                parameter.main_grad = parameter.grad.mul_(ranks)  # type: ignore[attr-defined]
            return
        (flat,) = given
        assert flat.grad is not None
        gradient = flat.grad.mul_(ranks)
        for parameter, place in zip(self._held, self._places, strict=True):
            part, room = flat_part(parameter), _room(flat, place)
            assert part is not None
            if not self._is_checked:
                found = self._module.utils.safe_get_local_fp32_param(parameter)
                self._compare(room, found[: len(room)])
            if part.local.data_ptr() != room.data_ptr():
                room.copy_(part.local)
                part.local.data = room
            parameter.main_grad = _room(gradient, place)  # type: ignore[attr-defined]
        self._is_checked = True


def import_deepspeed(device: torch.device) -> ModuleType:
    """Return DeepSpeed, set up for ``device``; raise :class:`ConfigError` if it is missing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel.dense is deepspeed, but the package cannot be imported ({error}); install "
            "it with pip install 'moeyard[deepspeed]', or use fsdp."
        ) from None
    # On CPUs DeepSpeed would compile a library for inference with g++, which takes a minute and
    # which training does not use.
    getattr(deepspeed.ops, "__compatible_ops__", {}).pop("deepspeed_shm_comm", None)
    module: ModuleType = deepspeed
    return module


def _parameters_of(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _room(flat: Tensor, place: Place) -> Tensor:
    """Return the numbers of a parameter in a rank's flat tensor."""
    return flat.detach()[place.offset : place.offset + place.stop - place.start]
