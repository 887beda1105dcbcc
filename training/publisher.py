"""Publish a run's weights while it trains: the units that have changed since the last update.

A unit is an expert of a layer, or another tensor. It has changed if the bytes that an export would
write are others than those published last: momentum, weight decay and orthogonal updates move
experts that got no token, so counts of tokens would not tell. Only a hash of each unit is kept.

The values are those of an export after this step: the same code makes them.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError, ModelFileError
from ..moe.config.model import LayersConfig
from ..moe.folders.expert_layouts import SeparateExperts
from ..moe.folders.families.table import FAMILIES
from ..moe.folders.tensor_names import dense_tensors
from ..moe.routes.identity import identity_of
from ..moe.updates.folder import UpdatesFolder
from ..moe.updates.manifest import Key, Manifest, UpdateError
from ..moe.updates.write import Head, UnitPlan, units_of, write_update
from ..parallel.mesh import Mesh
from ..parallel.watch.pulse import pulse
from .checkpoints.checkpoint import Checkpoints, StoredTensors
from .checkpoints.export import exported_values, exported_weights
from .config import RunConfig
from .observers.observers import Observer
from .optimizers.optimizer import MasterOptimizer
from .step import StepResult

log = logging.getLogger(__name__)

STAGING = ".publishing"
"""Folder in the run's where several ranks put their parts, for rank 0 to read."""


class Publisher(Observer):
    """Writes an update every ``publish.every`` steps. All ranks call it, and rank 0 writes.

    An update that cannot be written is only a warning, and the next one is a full snapshot.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LayersConfig,
        state: Callable[[], dict[str, Any]],
        optimizer: MasterOptimizer,
        run_dir: Path,
        mesh: Mesh,
    ) -> None:
        """``state`` returns what a checkpoint of now would say of the run.

        Raises :class:`ConfigError` on all ranks for a folder that cannot be used, and for models
        whose experts are not one by one in an export.
        """
        assert config.publish is not None, "the caller asks for it"
        self._config, self._options = config, config.publish
        self._state, self._optimizer, self._mesh = state, optimizer, mesh
        self._staging = run_dir / STAGING
        self._checkpoints = None if mesh.world_size == 1 else Checkpoints(self._staging, mesh, 1)
        family = FAMILIES[exported_values(state())["model_type"]]
        self._family = family.bind(family, model)
        self._parameter_of = {
            self._family.tensor_name(name): name for name, _ in dense_tensors(model)
        }
        self._trains_experts = config.train.parameters == "all" or (
            config.lora is not None and "experts" in config.lora.targets
        )
        self._folder = UpdatesFolder(Path(self._options.folder))
        self._architecture = identity_of(model).architecture
        self._run = run_name(state())
        self._digests: dict[Key, int] = {}
        """Of what was published last; empty if the next update must be a full snapshot."""
        self._last = 0
        self._since_full = 0
        self._check_model(model)
        mesh.on_rank_0(self._check_folder)

    def step(self, done: int, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """Publish if it is time."""
        is_last = done == self._config.train.steps or result.stop_requested
        if not is_last and done % self._options.every:
            return
        pulse.begin(f"publishing step {done}")
        published = time.time()
        is_full = self._mesh.on_rank_0(self._next_is_full)
        tensors = dict(self._tensors(is_full))
        try:
            with self._gathered(done, tensors) as stored:
                problem = self._mesh.on_rank_0(
                    lambda: self._publish(done, published, is_full, stored)
                )
        except CheckpointError as error:  # on all ranks
            problem = str(error)
        if problem is not None:
            self._digests = {}
            if self._mesh.rank == 0:
                log.warning("step %d is not published: %s Training goes on.", done, problem)

    def _check_model(self, model: LayersConfig) -> None:
        if self._config.lora is not None and self._config.lora.experts:
            raise ConfigError(
                f"publish is given, but lora.experts is {self._config.lora.experts}, and LoRA "
                "experts cannot be merged into weights; leave publish out."
            )
        if model.moe is None and self._options.what == "experts":
            raise ConfigError("publish.what is experts, but the model has none; use all.")
        if model.moe is not None and not isinstance(self._family.experts, SeparateExperts):
            raise ConfigError(
                f"publish is given, but {self._family.model_type} folders keep many experts in one "
                "tensor, and updates have single ones; leave publish out."
            )

    def _check_folder(self) -> None:
        """Refuse updates of another run, and clear what a killed run has left."""
        try:
            self._folder.clear_unfinished()
        except ModelFileError as error:
            raise ConfigError(f"publish.folder: {error}") from None
        for version in reversed(self._folder.versions()):
            try:
                found = self._folder.manifest(version)
            except UpdateError:
                continue
            if (found.run, found.architecture) != (self._run, self._architecture):
                raise ConfigError(
                    f"publish.folder is {self._options.folder!r}, which has updates of another "
                    "run; choose another folder."
                )
            return

    def _next_is_full(self) -> bool:
        is_time = self._since_full + 1 >= self._options.full_every
        return not self._digests or is_time or self._folder.wants_full()

    def _tensors(self, is_full: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights and buffers that an update may need, under a checkpoint's keys."""
        has_frozen = self._config.train.expert_memory is None
        for key, tensor in self._optimizer.named_tensors(has_frozen):
            needs_experts = is_full or self._trains_experts
            if key.startswith(("weight/", "buffer/")) and (
                needs_experts or ".mlp.experts." not in key
            ):
                yield key, tensor

    @contextmanager
    def _gathered(self, done: int, tensors: dict[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """Give the whole tensors on rank 0; elsewhere those of this rank, which no one reads.

        Raises :class:`CheckpointError` on all ranks if they cannot be gathered.
        """
        if self._checkpoints is None:
            yield {key: tensor.detach().cpu() for key, tensor in tensors.items()}
            return
        try:
            self._checkpoints.save(done, tensors, {})
            yield self._stored() if self._mesh.rank == 0 else tensors
        finally:
            if self._mesh.rank == 0:
                shutil.rmtree(self._staging, ignore_errors=True)

    def _stored(self) -> StoredTensors:
        (path,) = (self._staging / "checkpoints").glob("step-*")
        return StoredTensors(path)

    def _publish(
        self, done: int, published: float, is_full: bool, stored: Mapping[str, Tensor]
    ) -> str | None:
        """Write the update; return what went wrong, or None."""
        try:
            units = self._units(is_full, stored)
            versions = self._folder.versions()
            version = max([self._last, *versions]) + 1
            head = Head(
                version=version,
                base=None if is_full else self._last,
                run=self._run,
                architecture=self._architecture,
                what=self._options.what,
                step=done,
                published=published,
            )
            manifest = write_update(self._folder.of(version), head, units)
            self._note(manifest)
            self._folder.prune(self._options.keep)
        except OSError as error:
            return f"{self._options.folder} could not be written ({error.strerror or error})."
        except CheckpointError as error:
            return str(error)
        return None

    def _units(self, is_full: bool, stored: Mapping[str, Tensor]) -> Sequence[UnitPlan]:
        """Return the units to publish."""
        plans = exported_weights(self._state(), stored)
        if self._options.what == "experts":
            plans = [plan for plan in plans if plan.layer is not None]
        if not is_full and not self._trains_experts:
            plans = [plan for plan in plans if plan.layer is None]
        units = units_of(plans, self._parameter_of)
        if is_full:
            return units
        return [unit for unit in units if unit.digest() != self._digests[unit.key]]

    def _note(self, manifest: Manifest) -> None:
        """Remember what servers have from now on."""
        self._last = manifest.version
        self._since_full = 0 if manifest.is_full else self._since_full + 1
        self._digests |= {key: unit.digest for key, unit in manifest.units.items()}
        if manifest.is_full:
            self._folder.answer_wish()


def run_name(state: Mapping[str, Any]) -> str:
    """Return a short name for a run, the same after it was resumed."""
    names = ("seed", "model", "train_shard_sha256", "origin", "parameters", "lora", "optimizer")
    text = json.dumps([state[name] for name in names], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
