"""The training loop: resume, step, log, evaluate, checkpoint, stop when asked."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, DataError, Stopped
from ..files import replace_text
from ..moe.config.model import ModelConfig
from ..moe.routers.load import load_statistics
from ..parallel.dense.local_part import local_part
from ..parallel.mesh import Mesh
from ..parallel.watch.pulse import pulse
from .checkpoints.checkpoint import Checkpoints
from .checkpoints.files import read_state
from .checkpoints.start_from import read_origin
from .config import RunConfig
from .device import seed_rank
from .objectives.objective import Objective
from .objectives.table import DEFAULT, OBJECTIVES
from .observers.console import TrainingConsole
from .observers.open import open_observers
from .observers.phases import PhaseAverage
from .parallelize import parallelize
from .run.agreement import check_same_beginning
from .run.folder import dump_config
from .run.starts import note_start
from .run.stop import StopRequest
from .setup import build_model, check_batch, fill_vocabulary
from .step import StepResult, TrainStep

log = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3
"""In a row; then the run ends, because all that it does since would be lost with it."""


class Trainer:
    """A training run of one process among ``mesh.world_size``."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        mesh: Mesh,
        stop: StopRequest | None = None,
        objective: type[Objective] = OBJECTIVES[DEFAULT],
    ) -> None:
        check_batch(config, mesh)
        pulse.begin("preparing data")
        self._config = config
        self._mesh = mesh
        self._stop = stop or StopRequest()
        self._data = objective.open_data(config, run_dir / "data", mesh, self._stop)
        pulse.begin("building the model")
        self._model_config = fill_vocabulary(config, self._data.tokenizer)
        self.decoder = build_model(config, self._model_config, self._data, mesh)
        check_same_beginning(self._data, self.decoder, mesh.watch)
        self.objective = objective(config, self._data)
        self._loss = self.objective.module(self.decoder)
        parallel = parallelize(config, self.decoder, self._loss, mesh)
        self._step = TrainStep(config, self.decoder, self.objective, parallel, mesh)
        self._checkpoints = Checkpoints(run_dir, mesh, config.checkpoint.keep)
        self._failed_saves = 0
        """In a row."""
        self._run_dir = run_dir
        self._origin = None if config.start_from is None else read_origin(config.start_from)
        self._generator = torch.default_generator
        if torch.cuda.is_available():
            self._generator = torch.cuda.default_generators[torch.cuda.current_device()]

    def run(self) -> None:
        """Train to the last step, or to the step's end once asked to stop; both save first."""
        pulse.begin("looking for checkpoints")
        done = saved = self._resume()
        observers = open_observers(
            self._config, self._model_config, self._run_dir, self._mesh, resume_step=done
        )
        steps = self._config.train.steps
        console = TrainingConsole(done, steps, is_shown=self._mesh.rank == 0)
        try:
            self._mesh.on_rank_0(lambda: self._note_start(done))
            self._announce(console, done)
            if done >= steps:
                console.line(event="finished", step=done, advice="raise train.steps to go on")
            phases = self._step.phases
            phases.start()
            average = PhaseAverage(phases)
            while done < steps:
                started = time.perf_counter()
                pulse.begin(f"in step {done + 1}")
                self._data.train.wait_for(done)
                phases.lap("data")
                result = self._step.run(done, self._stop.signal_name is not None)
                done += 1
                seconds = time.perf_counter() - started
                average.count_step()
                held_out = self._evaluate_if_due(done, console)
                phases.lap("evaluate")
                observers.step(done, result, dict(phases.seconds))
                record = None
                if held_out or done % self._config.train.log_every == 0:
                    record = self._record(done, result, seconds)
                    record |= held_out | {"phases_s": average.take()}
                    observers.record(record)
                console.step(done, record)
                phases.lap("log")
                is_last = done == steps or result.stop_requested
                if is_last or done % self._config.checkpoint.every == 0:
                    saved = done if self._save(done, must=is_last) else saved
                    phases.lap("checkpoint")
                if result.stop_requested:
                    console.line(event="stopped", reason=self._stop.signal_name, saved_step=done)
                    break
        except (Stopped, DataError):  # before the step began, on all ranks alike
            if done != saved:
                self._save(done, must=True)
            raise
        finally:
            pulse.begin("ending")
            self._data.train.close()
            console.close()
            observers.close()

    def _note_start(self, done: int) -> None:
        replace_text(self._run_dir / "config.yaml", dump_config(self._config))
        note_start(self._run_dir, done, self._config, self.decoder, self._mesh)

    def _announce(self, console: TrainingConsole, done: int) -> None:
        held = [(local_part(p).numel(), p.requires_grad) for p in self.decoder.parameters()]
        console.line(
            event="resumed" if done else "started",
            step=done,
            ranks=self._mesh.world_size,
            ep=self._mesh.ep_size,
            shared_memory=self._mesh.groups_sharing_memory,
            parameters_here=sum(numel for numel, _ in held),
            trained_here=sum(numel for numel, trains in held if trains),
            train_tokens=self._data.num_train_tokens or "streamed",
            precision=self._config.train.precision,
        )

    def _evaluate_if_due(self, done: int, console: TrainingConsole) -> dict[str, Any]:
        """Return what the record gets: nothing, or the held-out loss."""
        every = self._config.train.eval_every
        if done != self._config.train.steps and not (every and done % every == 0):
            return {}
        pulse.begin(f"evaluating after step {done}")
        held_out = self.objective.evaluate(self._loss, self._mesh)
        shown = {name: f"{value:.4f}" for name, value in held_out.metrics.items()}
        console.line(event="evaluated", step=done, **shown, tokens=held_out.num_tokens)
        return dict(held_out.metrics)

    def _record(self, done: int, result: StepResult, seconds: float) -> dict[str, Any]:
        train, moe = self._config.train, self._model_config.moe
        tokens = train.batch_sequences * train.sequence_length
        expected = tokens * (moe.router.k if moe is not None else 0)
        return {
            "step": done,
            "loss": result.loss,
            "balance": result.balance,
            "z": result.z,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tokens": tokens * done,
            "step_tokens": tokens,
            "moe_layers": self._model_config.moe_layers,
            "load": [load_statistics(c, expected).as_dict() for c in result.counts_LE],
            "expert_tokens": result.counts_LE.tolist(),
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = dict(self._step.optimizer.named_tensors())
        tensors[self._rng_key()] = self._generator.get_state()
        return tensors

    def _rng_key(self) -> str:
        return f"rng/{self._mesh.rank}-of-{self._mesh.world_size}"

    def _save(self, done: int, must: bool) -> bool:
        """Save, and say whether that went well.

        A save that fails is a warning while there are more to come; then, or if ``must``, it
        raises :class:`CheckpointError`.
        """
        pulse.begin(f"saving step {done}")
        state = {
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
            **self._trained(),
        }
        try:
            self._checkpoints.save(done, self._tensors(), state)
        except CheckpointError as error:
            self._failed_saves += 1
            if must or self._failed_saves == MOST_FAILED_SAVES:
                raise
            if self._mesh.rank == 0:
                count = f"{self._failed_saves} of {MOST_FAILED_SAVES} failures in a row"
                log.warning("%s Training goes on to the next checkpoint (%s).", error, count)
            return False
        self._failed_saves = 0
        self._data.train.forget_before(self._checkpoints.oldest_step())
        return True

    def _trained(self) -> dict[str, Any]:
        """Return what decides which parameters there are and which of them have moments."""
        lora = self._config.lora
        return {
            "parameters": self._config.train.parameters,
            "lora": None if lora is None else lora.model_dump(mode="json"),
        }

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if any, and return the steps it has seen."""
        path = self._checkpoints.newest_whole()
        if path is None:
            return 0
        state = read_state(path)
        self._check_same_run(path, state)
        tensors = self._tensors()
        if state["world_size"] != self._mesh.world_size:
            tensors.pop(self._rng_key())  # other ranks drew these numbers; start a new stream
        self._checkpoints.load(path, tensors)
        if self._rng_key() in tensors:
            self._restore_generator(path, tensors[self._rng_key()])
        else:
            seed_rank(self._config.seed + state["step"], self._mesh.rank)
        self._step.optimizer.restore_parameters()
        self._step.optimizer.set_steps(state["step"])
        return int(state["step"])

    def _restore_generator(self, path: Path, state: torch.Tensor) -> None:
        try:
            self._generator.set_state(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint {path} holds no state of a random generator ({error}); restore it "
                "from a backup."
            ) from None

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        stored_model = ModelConfig.model_validate(state["model"]).architecture()
        for key, actual in self._model_config.architecture().items():
            if stored_model[key] != actual:
                raise CheckpointError(
                    f"checkpoint {path} has model.{key} = {stored_model[key]}, the configuration "
                    f"says {actual}; use the same model or a new run_dir."
                )
        state = {"parameters": "all", "lora": None} | state  # as older checkpoints mean it
        for key, actual in (
            ("seed", self._config.seed),
            ("train_shard_sha256", self._data.identity),
            ("batch_sequences", self._config.train.batch_sequences),
            ("sequence_length", self._config.train.sequence_length),
            *self._trained().items(),
        ):
            if state[key] != actual:
                raise CheckpointError(
                    f"checkpoint {path} was made with {key} = {state[key]}, this run has {actual}; "
                    "use the same or a new run_dir."
                )
