"""The training loop: resume, step, log, evaluate, checkpoint, stop when asked."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from ..dtypes import torch_dtype
from ..errors import ConfigError, MoeyardError
from ..files import replace_text
from ..moe.experts.streamed import ExpertSource, OpenSource
from ..moe.routers.load import load_statistics
from ..parallel.dense.local_part import held_numel
from ..parallel.mesh import Mesh
from ..parallel.watch.pulse import pulse
from .config import RunConfig
from .deepspeed_settings import deepspeed_settings
from .device import device
from .layer_schedule import LayerSchedule
from .objectives.objective import Objective
from .objectives.table import OBJECTIVES
from .observers.console import TrainingConsole
from .observers.observers import Observer, Observers
from .observers.open import open_observers
from .parallelize import parallelize
from .phases import PhaseAverage
from .publisher import Publisher
from .routes import RouteRecording
from .run.agreement import check_same_beginning
from .run.folder import dump_config
from .run.starts import count_parameters, note_start
from .saves import Saves
from .setup import build_model, check_batch, fill_vocabulary
from .step import StepResult, TrainStep
from .stop import StopRequest


class Trainer:
    """A training run of one process among ``mesh.world_size``."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        mesh: Mesh,
        stop: StopRequest | None = None,
        objective: type[Objective[Any]] | None = None,
        open_source: OpenSource | None = None,
    ) -> None:
        """``open_source`` opens the frozen experts of a run with ``train.expert_memory``."""
        check_batch(config, mesh)
        deepspeed_settings(config, mesh.world_size)  # refuses what cannot work
        objective = objective or OBJECTIVES[config.data.format]
        objective.check(config)
        pulse.begin("preparing data")
        self._config = config
        self._mesh = mesh
        self._stop = stop or StopRequest()
        self._data = objective.open_data(config, run_dir / "data", mesh, self._stop)
        pulse.begin("building the model")
        self.objective = objective(config, self._data)
        model = fill_vocabulary(config, self._data.tokenizer)
        self._model_config = self.objective.complete_model(model)
        self._source = _open(config, open_source)
        self.decoder = build_model(config, self._model_config, self._data, mesh, self._source)
        check_same_beginning(self._data, self.decoder, mesh.watch)
        loss, rows = self.objective.module(self.decoder), self.objective.mean_rows
        parallel = parallelize(config, self.decoder, loss, mesh, rows)
        self._loss = _scored(loss, config, mesh)
        """What evaluations call."""
        self._step = TrainStep(config, self.decoder, self.objective, parallel, mesh)
        self.saves = Saves(
            config,
            self._model_config,
            run_dir,
            mesh,
            self._data,
            self._step.optimizer,
            self._step.ownership,
        )
        self._copies = parallel.copies
        self._schedule: LayerSchedule | None = None
        if config.parallel.chunks == "auto" and parallel.pipelines:
            self._schedule = LayerSchedule(config, self.decoder, mesh, parallel.pipelines, rows)
        self._run_dir = run_dir

    def run(self) -> None:
        """Train to the last step, or finish the current one when asked to stop; then save."""
        done = self._begin()
        observers = self._open_observers(done)
        steps = self._config.train.steps
        console = TrainingConsole(done, steps, is_shown=self._mesh.rank == 0)
        try:
            parameters = count_parameters(self.decoder, self._mesh)
            self._mesh.on_rank_0(lambda: self._note_start(done, parameters))
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
                    record |= self._record_of_experts(result)
                    observers.record(record)
                if self._schedule is not None:
                    self._schedule.after_step(done)
                console.step(done, record)
                phases.lap("log")
                is_last = done == steps or result.stop_requested
                if is_last or done % self._config.checkpoint.every == 0:
                    self.saves.save(done, must=is_last)
                    phases.lap("checkpoint")
                if result.stop_requested:
                    console.line(
                        event="stopped",
                        reason=self._stop.signal_name,
                        saved_step=done,
                        advice=f"go on with: moeyard train {self._run_dir}",
                    )
                    break
        except MoeyardError as error:
            self.saves.end(done, error)
            raise
        finally:
            pulse.begin("ending")
            self._data.train.close()
            if self._source is not None:
                self._source.close()
            console.close()
            observers.close()

    def _begin(self) -> int:
        """Prepare the objective, and return the step of the newest checkpoint."""
        self.objective.before_training(self._loss, self._mesh, self._stop)
        pulse.begin("looking for checkpoints")
        return self.saves.resume()

    def _open_observers(self, done: int) -> Observers:
        run = (self._run_dir, self._mesh, done)
        of_this_rank: list[Observer] = []
        if self._config.monitor.routes is not None:
            model = (self.objective, self.decoder, self._step)
            of_this_rank.append(RouteRecording(*model, *run))
        if self._config.publish is not None:
            facts = (self._config, self._model_config, self.saves.state, self._step.optimizer)
            of_this_rank.append(Publisher(*facts, self._run_dir, self._mesh))
        return open_observers(self._config, *run, of_this_rank)

    def _note_start(self, done: int, parameters: dict[str, int]) -> None:
        replace_text(self._run_dir / "config.yaml", dump_config(self._config))
        note_start(self._run_dir, done, self._config, parameters, self._mesh)

    def _announce(self, console: TrainingConsole, done: int) -> None:
        streamed = {} if self._source is None else {"expert_slots": self._source.num_slots}
        held = [(held_numel(p), p.requires_grad) for p in self.decoder.parameters()]
        console.line(
            event="resumed" if done else "started",
            step=done,
            ranks=self._mesh.world_size,
            pp=self._mesh.pp_size,
            ep=self._mesh.ep_size,
            expert_tp=self._mesh.expert_tp_size,
            shared_memory=self._mesh.groups_sharing_memory,
            parameters_here=sum(numel for numel, _ in held),
            trained_here=sum(numel for numel, trains in held if trains),
            train_tokens=self._data.num_train_tokens or "streamed",
            precision=self._config.train.precision,
            **streamed,
        )

    def _evaluate_if_due(self, done: int, console: TrainingConsole) -> dict[str, Any]:
        """Return the held-out metrics for the record; empty if no evaluation is due."""
        every = self._config.train.eval_every
        if done != self._config.train.steps and not (every and done % every == 0):
            return {}
        pulse.begin(f"evaluating after step {done}")
        held_out = self.objective.evaluate(self._loss, self._mesh)
        shown = {name: f"{value:.4f}" for name, value in held_out.metrics.items()}
        console.line(event="evaluated", step=done, **shown, tokens=held_out.num_tokens)
        return dict(held_out.metrics)

    def _record_of_experts(self, result: StepResult) -> dict[str, Any]:
        """Return the chosen way of rows to their experts and what copies did, if there are any."""
        found = {} if self._schedule is None else {"schedule": self._schedule.record()}
        if self._copies is not None:
            found["copies"] = self._copies.record(result.counts_LE)
        return found

    def _record(self, done: int, result: StepResult, seconds: float) -> dict[str, Any]:
        tokens = result.num_tokens
        loads = map(load_statistics, result.counts_LE, result.dropped_L)
        slices = self._step.slices
        sliced: dict[str, Any] = {} if slices is None else {"gradient_slices": slices.record()}
        masks = self._step.optimizer.masks
        sliced |= {} if masks is None else masks.record(self._mesh)
        return sliced | {
            "step": done,
            "loss": result.loss,
            **{f"train_{name}": value for name, value in result.measures.items()},
            "balance": result.balance,
            "z": result.z,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tokens": self.objective.num_tokens(range(done)),
            "step_tokens": tokens,
            "moe_layers": self._config.routed_layers,
            "load": [load.as_dict() for load in loads],
            "expert_tokens": result.counts_LE.tolist(),
        }


def _open(config: RunConfig, open_source: OpenSource | None) -> ExpertSource | None:
    """Open the frozen experts, if they are not to be parameters."""
    budget = config.train.expert_memory
    if budget is None:
        return None
    assert config.start_from is not None and open_source is not None, "who opens the experts?"
    if device().type != "cpu":
        raise ConfigError(
            f"train.expert_memory is {budget!r}, but ranks compute on GPUs, and experts are read "
            "for the CPU only; leave it out, or hide the GPUs with CUDA_VISIBLE_DEVICES=."
        )
    return open_source(config.start_from, torch_dtype(config.train.precision), budget)


def _scored(loss: nn.Module, config: RunConfig, mesh: Mesh) -> nn.Module:
    """Return the module that evaluations call, with stages or without."""
    if mesh.pp_size == 1:
        return loss
    from .stages import RelayedLoss  # torch's pipelining takes a second to import

    return RelayedLoss(loss, config, mesh)
