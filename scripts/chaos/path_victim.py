"""The training program on one way of rows to their experts, with odd choices or a lost rank.

    CHAOS="RANK KIND TRANSPORT" path_victim.py CONFIG [a.b=c ...]

KIND odd is one of choices, by step: 1 starved (only the lower half of the experts are chosen),
2 hot (only expert 0), 3 empty (RANK brings no rows to its layers), 4 both. Other kinds are of
grief, in step 2 of RANK: kill or stop, with -forward, -backward or -copies, as the second exchange
of that phase begins. TRANSPORT: shared (memory) or gloo.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

RANK, KIND, TRANSPORT = os.environ["CHAOS"].split()
is_victim = os.environ.get("RANK") == RANK
STEP = {"number": 0}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def around(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a method by what ``make`` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def count_steps() -> None:
    """Keep the number of the step."""
    from moeyard.training.step import TrainStep

    def counted(run: Callable[..., Any]) -> Any:
        def run_and_count(*arguments: Any, **options: Any) -> Any:
            STEP["number"] += 1
            return run(*arguments, **options)

        return run_and_count

    around(TrainStep, "run", counted)


def choose_few() -> None:
    """Let every router send its rows to few experts."""
    import torch

    from moeyard.moe.routers.routing import count_choices
    from moeyard.moe.routers.topk import TopKRouter

    def folded(route: Callable[..., Any]) -> Any:
        def odd_route(router: Any, router_input: Any) -> Any:
            routing = route(router, router_input)
            experts_TK = routing.experts_TK % (router.num_experts // 2)
            experts_TK[experts_TK[:, 0] == experts_TK[:, 1], 1] = -1  # none has a row twice
            if STEP["number"] in (2, 4):
                experts_TK = torch.full_like(experts_TK, -1)
                experts_TK[:, 0] = 0
            counts_E = count_choices(experts_TK, router.num_experts)
            return replace(routing, experts_TK=experts_TK, counts_E=counts_E)

        return odd_route

    around(TopKRouter, "route", folded)


def bring_no_rows() -> None:
    """Let this rank's layers run with T = 0."""
    from moeyard.parallel.experts.all_to_all import AllToAllPath
    from moeyard.parallel.experts.padded import PaddedPath
    from moeyard.parallel.experts.pipelined import PipelinedPath

    def without_rows(run: Callable[..., Any]) -> Any:
        def run_empty(path: Any, *arguments: Any) -> Any:
            if STEP["number"] not in (3, 4):
                return run(path, *arguments)
            place = 1 if isinstance(arguments[0], list | tuple) else 0  # behind the levels
            x_TD, routing = arguments[place : place + 2]
            none = replace(
                routing,
                experts_TK=routing.experts_TK[:0],
                weights_TK=routing.weights_TK[:0],
            )
            given = [*arguments]
            given[place : place + 2] = x_TD[:0], none
            beside = given[place + 3] if len(given) > place + 3 else None
            if beside is not None:
                given[place + 3] = None
            y_TD = x_TD.new_zeros(x_TD.shape) + run(path, *given).sum()
            return y_TD if beside is None else y_TD + beside()

        return run_empty

    around(AllToAllPath, "run", without_rows)
    around(PaddedPath, "run", without_rows)
    around(PipelinedPath, "run_over", without_rows)


def come_to_grief(harm: str, phase: str) -> None:
    """End or stop this process in the second exchange of a phase of step 2."""
    from moeyard.parallel.dense.replicated import Replicated
    from moeyard.parallel.experts.exchange import GroupExchange, SharedExchange
    from moeyard.parallel.experts.sparse_collectives import SparseCollectives
    from moeyard.training.step import TrainStep

    seen = {"steps": 0, "armed": False, "exchanges": 0}

    def arm(method: Callable[..., Any], is_step: bool) -> Any:
        def armed(*arguments: Any, **options: Any) -> Any:
            seen["steps"] += is_step
            if seen["steps"] == 2 and (phase == "backward") != is_step:
                seen["armed"] = True
            return method(*arguments, **options)

        return armed

    def harmed(method: Callable[..., Any]) -> Any:
        def harm_or_run(*arguments: Any, **options: Any) -> Any:
            seen["exchanges"] += seen["armed"]
            if seen["exchanges"] == 2:
                seen["armed"] = False
                sys.stderr.write(f"event=harm pid={os.getpid()}\n")
                sys.stderr.flush()
                os.kill(os.getpid(), SIGNALS[harm])
            return method(*arguments, **options)

        return harm_or_run

    around(TrainStep, "run", lambda method: arm(method, True))
    around(Replicated, "backward", lambda method: arm(method, False))
    if phase == "copies":
        around(SparseCollectives, "gather", harmed)
    else:
        around(GroupExchange, "rows", harmed)
        around(SharedExchange, "rows", harmed)


def without_shared_memory(build: Callable[..., Any]) -> Any:
    """Return a mesh as on several hosts."""

    def build_apart(*arguments: Any, **options: Any) -> Any:
        hosts = dict.fromkeys(("dp_host", "ep_host", "edp_host", "expert_tp_host"))
        return replace(build(*arguments, **options), **hosts)

    return build_apart


def main() -> int:
    """Arm and train."""
    from moeyard.parallel.experts import open_path
    from moeyard.training import __main__ as entry
    from moeyard.training import program

    harm, _, phase = KIND.partition("-")
    if KIND == "odd":
        count_steps()
        choose_few()
        if is_victim:
            bring_no_rows()
    elif is_victim and harm in SIGNALS:
        come_to_grief(harm, phase)
    if TRANSPORT == "gloo":
        around(program, "build_mesh", without_shared_memory)
        open_path.host_of = lambda group, timeout_s: None
    return entry.main(sys.argv[1:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # as the program itself does
