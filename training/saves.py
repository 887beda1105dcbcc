"""Save a run and resume it: weights, moments, random generator, and settings that must match."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import (
    CheckpointError,
    DataError,
    LostRankError,
    MoeyardError,
    Stopped,
    TrainingError,
)
from ..moe.config.model import LayersConfig
from ..parallel.mesh import Mesh
from ..parallel.watch.pulse import pulse
from .checkpoints.checkpoint import Checkpoints, StoredTensors
from .checkpoints.files import check_same_model, read_state
from .checkpoints.start_from import read_origin
from .config import RunConfig
from .data.data import Data
from .device import seed_rank
from .optimizers.optimizer import MasterOptimizer
from .ownership import Ownership

log = logging.getLogger(__name__)

EXPERTS = "experts"
"""Who owns which expert, and the load from which the next copies follow (ownership.py)."""
GENERATOR_BYTES = (16, 5056)
"""The state of a GPU's random generator, and of a CPU's."""
MOST_FAILED_SAVES = 3
"""Failed saves in a row that end the run: a crash would lose all work since the last save."""
LONG_WAIT_S = 0.1
"""A save that waits longer for the one before says so."""

BEFORE: dict[str, Any] = {"parameters": "all", "optimizer": {"kind": "adamw"}}
BEFORE |= dict.fromkeys(("lora", "frozen", "sparse_experts"))
"""What checkpoints of releases without these settings were made with."""


class Saves:
    """The checkpoints of one run."""

    def __init__(
        self,
        config: RunConfig,
        model: LayersConfig,
        run_dir: Path,
        mesh: Mesh,
        data: Data,
        optimizer: MasterOptimizer,
        ownership: Ownership | None = None,
    ) -> None:
        self._config = config
        self._model_config = model
        self._mesh = mesh
        self._data = data
        self._optimizer = optimizer
        self._ownership = ownership
        self.checkpoints = Checkpoints(run_dir, mesh, config.checkpoint.keep)
        self._failed_saves = 0  # in a row
        self.saved = 0
        """The step of the last checkpoint of this run that is known to be whole."""
        self._under_way: int | None = None  # the step that is being written
        self._origin = None if config.start_from is None else read_origin(config.start_from)
        self._generator = torch.default_generator
        if torch.cuda.is_available():
            self._generator = torch.cuda.default_generators[torch.cuda.current_device()]

    def save(self, done: int, must: bool) -> None:
        """Save, after waiting for the save before.

        With ``checkpoint.asynchronous`` this returns when the tensors are copied, unless ``must``.
        The next call then learns how it ended.

        A failed save is only a warning. It raises :class:`CheckpointError` if ``must``, or if it is
        the :data:`MOST_FAILED_SAVES`-th in a row.
        """
        pulse.begin(f"saving step {done}")
        if self._end_last(done, must) == done:
            return
        content = done, self._tensors(), self.state()
        if self._config.checkpoint.asynchronous and not must:
            self.checkpoints.start(*content, self._warn_early)
            self._under_way = done
            return
        try:
            self.checkpoints.save(*content)
        except CheckpointError as error:
            self._count_failure(error, must)
            self._warn(error, self._failed_saves)
        else:
            self._count_success(done)

    def end(self, done: int, error: MoeyardError) -> None:
        """Save what can be saved of a run that ends with an error after step ``done``."""
        if isinstance(error, Stopped | DataError):  # raised between steps, on all ranks
            if done != self.saved:
                self.save(done, must=True)
        elif isinstance(error, TrainingError) and not isinstance(error, LostRankError):
            # Raised on all ranks, inside a step. They finish the save under way.
            with suppress(CheckpointError):  # the warning has been given
                self.checkpoints.wait()

    def _end_last(self, due: int, must: bool) -> int | None:
        """Wait for the save under way, if any; return its step if it is written."""
        if self._under_way is None:
            return None
        step, self._under_way = self._under_way, None
        began = time.monotonic()
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            if not must:  # otherwise the last save may still succeed
                self._count_failure(error)
            return None
        self._count_success(step)
        waited_s = time.monotonic() - began
        if waited_s > LONG_WAIT_S and not must and self._mesh.rank == 0:
            facts = f"the save of step {due} waited {waited_s:.1f} s for that of step {step}"
            log.warning("%s; raise checkpoint.every if this happens often.", facts)
        return step

    def _count_success(self, step: int) -> None:
        self._failed_saves = 0
        self.saved = step
        self._data.train.forget_before(self.checkpoints.oldest_step())

    def _count_failure(self, error: CheckpointError, must: bool = False) -> None:
        self._failed_saves += 1
        if must or self._failed_saves == MOST_FAILED_SAVES:
            raise error

    def _warn(self, error: CheckpointError, failures: int) -> None:
        if self._mesh.rank == 0:
            count = f"{failures} of {MOST_FAILED_SAVES} failures in a row"
            log.warning("%s Training goes on to the next checkpoint (%s).", error, count)

    def _warn_early(self, error: BaseException) -> None:
        """Warn in the thread that writes, before the main thread learns of the failure."""
        if isinstance(error, CheckpointError):
            self._warn(error, self._failed_saves + 1)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if any, and return the steps it has seen."""
        path = self.checkpoints.newest_whole()
        if path is None:
            return 0
        state = read_state(path)
        self._check_same_run(path, state)
        if self._ownership is not None and EXPERTS in state:  # or copies are new in this run
            self._ownership.restore(state[EXPERTS])
        tensors = self._tensors()
        if self._has_other_streams(path, state):
            tensors.pop(self._rng_key())  # start new ones
        self.checkpoints.load(path, tensors)
        if self._rng_key() in tensors:
            self._restore_generator(path, tensors[self._rng_key()])
        else:
            seed_rank(self._config.seed + state["step"], self._mesh.rank)
        self._optimizer.set_steps(state["step"])
        self._optimizer.restore_parameters()
        self.saved = int(state["step"])
        return int(state["step"])

    def _has_other_streams(self, path: Path, state: dict[str, Any]) -> bool:
        """Say whether a checkpoint has random streams of other ranks, or of another device."""
        if state["world_size"] != self._mesh.world_size:
            return True
        stored, key = StoredTensors(path), self._rng_key()
        if key not in stored:
            return False  # which loading refuses
        num_bytes = stored.type_and_shape(key)[1][0]
        return num_bytes != len(self._generator.get_state()) and num_bytes in GENERATOR_BYTES

    def _restore_generator(self, path: Path, state: torch.Tensor) -> None:
        try:
            self._generator.set_state(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint {path} has no valid random generator state ({error}); restore it "
                "from a backup."
            ) from None

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        check_same_model(path, state["model"], self._model_config)
        state = BEFORE | state
        for key, actual in (
            ("seed", self._config.seed),
            ("train_shard_sha256", self._data.identity),
            ("batch_sequences", self._config.train.batch_sequences),
            ("sequence_length", self._config.train.sequence_length),
            *self._trained().items(),
        ):
            if state[key] != actual:
                raise CheckpointError(
                    f"checkpoint {path} was made with {key} = {state[key]}, but this run has "
                    f"{actual}; use the same value or a new run_dir."
                )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = dict(self._optimizer.named_tensors(self._config.train.expert_memory is None))
        tensors[self._rng_key()] = self._generator.get_state()
        return tensors

    def _rng_key(self) -> str:
        return f"rng/{self._mesh.rank}-of-{self._mesh.world_size}"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of now says of the run, apart from the step."""
        experts = {} if self._ownership is None else {EXPERTS: self._ownership.state()}
        return experts | {
            "world_size": self._mesh.world_size,
            "seed": self._config.seed,
            "model": self._model_config.model_dump(mode="json"),
            "train_shard_sha256": self._data.identity,
            "batch_sequences": self._config.train.batch_sequences,
            "sequence_length": self._config.train.sequence_length,
            "precision": self._config.train.precision,
            **self._tokenizer(),
            "origin": self._origin,
            "chat_template": self._data.chat_template,
            "files": dict(self._data.files),
            **self._trained(),
        }

    def _tokenizer(self) -> dict[str, Any]:
        if self._data.tokenizer is None:
            return {"tokenizer": None}
        name = self._config.tokenizer
        return {"tokenizer": name, "tokenizer_sha256": self._data.tokenizer.sha256}

    def _trained(self) -> dict[str, Any]:
        """Return the settings that decide which parameters exist and what they have."""
        lora, frozen, sparse = self._config.lora, None, self._config.train.sparse_experts
        if self._config.train.expert_memory is not None and self._origin is not None:
            frozen = self._origin["weights"]  # they stay in their folder
        return {
            "parameters": self._config.train.parameters,
            "lora": None if lora is None else lora.model_dump(mode="json"),
            "frozen": frozen,
            "optimizer": self._config.optimizer.identity(),
            "sparse_experts": None if sparse is None else sparse.identity(),
        }
