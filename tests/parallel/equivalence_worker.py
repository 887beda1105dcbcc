"""One rank of the equivalence tests: run training steps and save what they computed.

    torchrun ... equivalence_worker.py CONFIG OUT CASES_JSON

For each case (name -> overrides) every rank writes OUT/NAME-RANK.pt with loss, gradient norm,
main gradients before clipping, and weights, each under topology-free keys, for every step.

A case may also have ``saves`` (the step after which there is a checkpoint), ``resumes`` (the case
whose checkpoint it goes on from), ``replays`` (the case whose recorded routes it takes) and
``evaluates`` (the held-out measures come with the last step).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from moeyard.kernels.values.activation import fc1_parts
from moeyard.moe.experts.resident import Experts
from moeyard.moe.layer import MoELayer
from moeyard.moe.models import routed
from moeyard.moe.routers.own_code import allow
from moeyard.moe.routers.routing import count_choices
from moeyard.moe.routers.topk import TopKRouter
from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.dense import replicated
from moeyard.parallel.dense.gradient_queue import GradientQueue
from moeyard.parallel.dense.local_part import as_part_of, flat_part, local_part
from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.parallel.profiling.gradient_slices import GradientSlices
from moeyard.training.layer_schedule import LayerSchedule
from moeyard.training.objectives.table import OBJECTIVES
from moeyard.training.parallelize import parallelize
from moeyard.training.read_config import read_run_config
from moeyard.training.routes import RouteRecording, replaying_steps
from moeyard.training.saves import Saves
from moeyard.training.setup import build_model, fill_vocabulary
from moeyard.training.step import TrainStep

STEPS = 3
LIMIT_S = 150
"""On a busy machine a rank once waited for longer than 60 s."""
replicated.QUEUED_BUCKET_MB = 1 / 256  # so that the small model has several
sys.path.append(str(Path(__file__).parent.parent / "moe"))  # where cosine_router.py is


def starve_upper_half(decoder) -> None:
    """Fold every choice onto the lower half of the experts; the upper half gets nothing."""
    for router in decoder.routers():
        route = router.route

        def folded(router_input, route=route, router=router):
            routing = route(router_input)
            experts_TK = routing.experts_TK % (router.num_experts // 2)
            counts_E = count_choices(experts_TK, router.num_experts)
            return replace(routing, experts_TK=experts_TK, counts_E=counts_E)

        assert isinstance(router, TopKRouter)
        router.route = folded


class BiasedLayer(MoELayer):
    """A layer whose experts have biases, which no configuration asks for."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **(options | {"expert_bias": True}))


def fill_biases(decoder) -> None:
    """Give every expert different biases, the same on any rank."""
    for _, layer in decoder.moe_layers():
        experts: Experts = layer.experts
        factors_S1 = torch.tensor(experts.expert_ids).unsqueeze(1) + 1
        line_F = torch.linspace(-1, 1, layer.d_expert)
        line_D = torch.linspace(-1, 1, layer.d_model)
        parts = len(fc1_parts(experts.activation))
        of_parts = [line_F * (factors_S1 + part) for part in range(parts)]
        biases = {
            "fc1_bias": torch.cat(of_parts, dim=1),
            "fc2_bias": line_D * (factors_S1 + 2),
        }
        for name, bias in biases.items():
            cut = experts.inner_slice
            experts.get_parameter(name).data.copy_(bias if cut is None else cut.cut(name, bias))


def keyed(decoder, tensor_of, shards=None) -> dict[str, torch.Tensor]:
    """Return tensors under topology-free keys; with ``shards`` of experts only the owned ones."""
    values = {}
    for name, parameter in decoder.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = decoder.get_submodule(owner_name)
        tensor = tensor_of(parameter)
        if tensor is None:
            continue
        part = flat_part(parameter)
        tensor = local_part(tensor)
        tensor = as_part_of(parameter, tensor) if part is None else part.whole(tensor)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        tensor = tensor.double().clone()
        if isinstance(owner, Experts):
            cut = owner.inner_slice
            if cut is not None and not cut.holds(leaf):
                continue
            part = "" if cut is None or leaf == "fc2_bias" else f"|{cut.index} of {cut.count}"
            slots = range(len(owner.expert_ids))
            for slot in slots if shards is None else slots[shards.owned(parameter)]:
                expert = owner.expert_ids[slot]
                values[f"{owner_name}.{expert}.{leaf}{part}"] = tensor[slot]
        else:
            values[name] = tensor
    return values


def main_grad_of(parameter) -> torch.Tensor | None:
    assert hasattr(parameter, "main_grad") == parameter.requires_grad
    return parameter.main_grad if parameter.requires_grad else None


def slice_early(step, parallel, mesh) -> None:
    """Send at once in the first step, at the end of the second, and as planned in the third."""
    parallel.engine.queue.way = "at once"
    pipelines = list(parallel.pipelines.values())
    here = torch.device("cpu")
    step.slices = GradientSlices(parallel.engine.queue, pipelines, mesh, here, 1, 1)


def plan_odd_slices(step, queue) -> None:
    """Send a third of what waits at each chance, in numbers of bytes that fit no tensor."""
    waiting, plan = 0, []
    for stage in step.slices.stages:
        plan.append(waiting // 24 * 8)
        waiting += stage.new_bytes - plan[-1]
    assert plan[0] == 0 and sum(number > 0 for number in plan) > 2
    queue.way, queue.plan = "planned", plan[1:]


def state_of_routers(decoder) -> dict[str, torch.Tensor]:
    return {
        n: b.double().clone()
        for n, b in decoder.named_buffers()
        if ".gate." in n or ".average." in n
    }


def run_case(config_path: Path, out: Path, name: str, case: dict, watch) -> None:
    run_dir = out / case.get("resumes", name)
    config = read_run_config(config_path, [*case["overrides"], f"run_dir={run_dir}"])
    degrees = {"expert_tp": config.parallel.expert_tp, "pp": config.parallel.pp}
    num_experts = 1 if config.model.moe is None else config.model.moe.num_experts
    mesh = build_mesh(config.parallel.ep, num_experts, watch, LIMIT_S, **degrees)
    if case.get("apart"):  # as on several hosts
        hosts = ("dp_host", "ep_host", "edp_host", "expert_tp_host")
        mesh = replace(mesh, **dict.fromkeys(hosts))
    kind = OBJECTIVES[config.data.format]
    data = kind.open_data(config, out / case.get("data", name) / "data", mesh)
    objective = kind(config, data)
    model = objective.complete_model(fill_vocabulary(config, data.tokenizer))
    decoder = build_decoder(config, model, data, mesh, case)
    loss = objective.module(decoder)
    parallel = parallelize(config, decoder, loss, mesh, objective.mean_rows)
    step = TrainStep(config, decoder, objective, parallel, mesh)
    if case.get("early"):
        slice_early(step, parallel, mesh)
    schedule = None
    if config.parallel.chunks == "auto":
        paths = parallel.pipelines
        schedule = LayerSchedule(config, decoder, mesh, paths, objective.mean_rows)
    saves = Saves(config, model, run_dir, mesh, data, step.optimizer, step.ownership)
    first = saves.resume() if "resumes" in case else 0
    watched = WatchedSteps(step, decoder, schedule)
    watched.queue = parallel.engine.queue if case.get("early") else None
    if config.monitor.routes is not None:
        run_dir.mkdir(exist_ok=True)
        watched.recording = RouteRecording(objective, decoder, step, run_dir, mesh, first)
    if "replays" in case:
        routes = read_routes(out / case["replays"] / "routes")
        with replaying_steps(step, decoder, objective, routes):
            watched.run(first, STEPS)
    else:
        if "saves" in case:
            watched.run(first, case["saves"])
            saves.save(case["saves"], must=True)
            first = case["saves"]
        watched.run(first, STEPS)
    if case.get("evaluates"):
        watched.recorded[-1]["held_out"] = objective.evaluate(loss, mesh).metrics
    torch.save(watched.recorded, out / f"{name}-{mesh.rank}.pt")
    mesh.barrier()


def build_decoder(config, model, data, mesh, case: dict):
    routed.MoELayer = BiasedLayer if case.get("biased") else MoELayer
    decoder = build_model(config, model, data, mesh)
    if case.get("biased"):
        fill_biases(decoder)
    if case.get("starved"):
        starve_upper_half(decoder)
    return decoder


class WatchedSteps:
    """Steps whose gradients and weights are kept."""

    def __init__(self, step: TrainStep, decoder, schedule: LayerSchedule | None) -> None:
        self.recorded: list[dict] = []
        self.recording: RouteRecording | None = None
        self.queue: GradientQueue | None = None
        """Of gradients that travel early in the third step."""
        self._step, self._decoder, self._schedule = step, decoder, schedule
        scale = step.gradients.scale_

        def record_then_scale(factor):
            gradients = keyed(decoder, main_grad_of, step.gradients.shards)
            self.recorded.append({"gradients": gradients})
            scale(factor)

        step.gradients.scale_ = record_then_scale

    def run(self, first: int, last: int) -> None:
        for index in range(first, last):
            result = self._step.run(index, stop_requested=False)
            self.recorded[-1] |= {
                "loss": result.loss,
                "balance": result.balance,
                "grad_norm": result.grad_norm,
                "counts": result.counts_LE,
                "weights": keyed(self._decoder, lambda p: p) | state_of_routers(self._decoder),
            }
            if self.queue is not None and index == 1:
                plan_odd_slices(self._step, self.queue)
            if self._schedule is not None:
                self.recorded[-1]["schedule"] = self._schedule.record()
                self._schedule.after_step(index + 1)
            if self.recording is not None:
                self.recording.step(index + 1, result, {})
        if self.recording is not None:
            self.recording.close()


def main() -> None:
    allow("cosine_router")
    config_path, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    with process_group(LIMIT_S) as watch:
        for name, case in cases.items():
            run_case(config_path, out, name, case, watch)


if __name__ == "__main__":
    main()
