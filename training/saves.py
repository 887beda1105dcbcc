"""Save a run and resume it: weights, moments, random generator, and settings that must match."""

import logging
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..moe.config.model import ModelConfig
from ..parallel.mesh import Mesh
from ..parallel.watch.pulse import pulse
from .checkpoints.checkpoint import Checkpoints
from .checkpoints.files import read_state
from .checkpoints.start_from import read_origin
from .config import RunConfig
from .data.data import Data
from .device import seed_rank
from .optimizers.optimizer import MasterOptimizer
from .ownership import Ownership

log = logging.getLogger(__name__)

EXPERTS = "experts"
"""Who owns which expert, and the load from which the next copies follow (ownership.py)."""
MOST_FAILED_SAVES = 3
"""Failed saves in a row that end the run: a crash would lose all work since the last save."""


class Saves:
    """The checkpoints of one run."""

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
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
        self._failed_saves = 0
        """Number of failed saves in a row."""
        self._origin = None if config.start_from is None else read_origin(config.start_from)
        self._generator = torch.default_generator
        if torch.cuda.is_available():
            self._generator = torch.cuda.default_generators[torch.cuda.current_device()]

    def save(self, done: int, must: bool) -> bool:
        """Save, and say whether that succeeded.

        A failed save is only a warning. It raises :class:`CheckpointError` if ``must``, or if it is
        the :data:`MOST_FAILED_SAVES`-th in a row.
        """
        pulse.begin(f"saving step {done}")
        try:
            self.checkpoints.save(done, self._tensors(), self._state())
        except CheckpointError as error:
            self._failed_saves += 1
            if must or self._failed_saves == MOST_FAILED_SAVES:
                raise
            if self._mesh.rank == 0:
                count = f"{self._failed_saves} of {MOST_FAILED_SAVES} failures in a row"
                log.warning("%s Training goes on to the next checkpoint (%s).", error, count)
            return False
        self._failed_saves = 0
        self._data.train.forget_before(self.checkpoints.oldest_step())
        return True

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
        if state["world_size"] != self._mesh.world_size:
            tensors.pop(self._rng_key())  # the number of ranks changed; start new streams
        self.checkpoints.load(path, tensors)
        if self._rng_key() in tensors:
            self._restore_generator(path, tensors[self._rng_key()])
        else:
            seed_rank(self._config.seed + state["step"], self._mesh.rank)
        self._optimizer.restore_parameters()
        self._optimizer.set_steps(state["step"])
        return int(state["step"])

    def _restore_generator(self, path: Path, state: torch.Tensor) -> None:
        try:
            self._generator.set_state(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint {path} has no valid random generator state ({error}); restore it "
                "from a backup."
            ) from None

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        stored_model = ModelConfig.model_validate(state["model"]).architecture()
        for key, actual in self._model_config.architecture().items():
            if stored_model[key] != actual:
                raise CheckpointError(
                    f"checkpoint {path} has model.{key} = {stored_model[key]}, but the "
                    f"configuration says {actual}; use the same model or a new run_dir."
                )
        state = {"parameters": "all", "lora": None} | state  # defaults for older checkpoints
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
        tensors = dict(self._optimizer.named_tensors())
        tensors[self._rng_key()] = self._generator.get_state()
        return tensors

    def _rng_key(self) -> str:
        return f"rng/{self._mesh.rank}-of-{self._mesh.world_size}"

    def _state(self) -> dict[str, Any]:
        experts = {} if self._ownership is None else {EXPERTS: self._ownership.state()}
        return experts | {
            "world_size": self._mesh.world_size,
            "seed": self._config.seed,
            "model": self._model_config.model_dump(mode="json"),
            "train_shard_sha256": self._data.identity,
            "batch_sequences": self._config.train.batch_sequences,
            "sequence_length": self._config.train.sequence_length,
            "precision": self._config.train.precision,
            "tokenizer": self._config.data.tokenizer,
            "tokenizer_sha256": self._data.tokenizer.sha256,
            "origin": self._origin,
            "chat_template": self._data.chat_template,
            **self._trained(),
        }

    def _trained(self) -> dict[str, Any]:
        """Return the settings that decide which parameters exist and which of them have moments."""
        lora = self._config.lora
        return {
            "parameters": self._config.train.parameters,
            "lora": None if lora is None else lora.model_dump(mode="json"),
        }
