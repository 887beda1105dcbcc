"""What a token costs on its way from the engine to the client's socket.

    python benchmarks/token_path.py [--model DIR] [--arms engine app serve] [--write NAME]

Three arms: the bare engine, the engine behind the HTTP application (uvicorn, one process), and
``moeyard serve``. The same greedy streams in each, ``--streams`` at once. Printed: tokens per
second, ms between tokens of a stream, and CPU microseconds per chunk, from the kernel's
nanosecond account of every thread. "engine" is the busiest thread of the process with the model
(run it with one compute thread), "path" is the rest of that process, "proxy" is Ray's HTTP proxy.
Without ``--model``: random weights in the demo's shape, whose head never chooses half a character,
so that every token is a chunk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from token_path_client import cpu_ns

from moeyard.moe.config.model import ModelConfig, MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routers.topk import TopK
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from report import write_results

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serving"))
from server_process import BIN, Running, free_port, name_of
from small_model import write_decoder

HERE = Path(__file__).parent
PROMPT = "def main(argument):"
ARMS = ("engine", "app", "serve")


def write_demo_model(folder: Path) -> None:
    """Write random weights in the shape of scripts/demo."""
    moe = MoEConfig(num_experts=8, d_expert=256, router=TopK(k=2))
    config = ModelConfig(
        vocab_size=257,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_positions=4096,
        d_ff=256,
        moe=moe,
    )
    model = Decoder(config)
    initialize(model, 5)
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
        if "lm_head" in name:
            parameter.data[128:] = 0
    write_decoder(folder, model, eos_id=256)


def bare_engine(model: str, num_streams: int, num_tokens: int, threads: int) -> dict[str, Any]:
    """Run the streams in ``Engine.step`` alone."""
    torch.set_num_threads(threads)
    served, store = open_model(model)
    tokenizer = ServeArgs(model=model).open_tokenizer()
    engine = Engine(served, tokenizer.decode, store, max_num_seqs=num_streams)
    prompt = tuple(tokenizer.encode(PROMPT))
    for index in range(num_streams):
        engine.add(
            GenerationRequest(
                str(index), prompt, num_tokens, SamplingParams(temperature=0), ignore_eos=True
            )
        )
    while sum(len(engine.step()) for _ in range(20)) < 20 * num_streams:
        pass  # until every prompt is read
    started, before = time.monotonic(), cpu_ns([os.getpid()])
    num_events = 0
    for _ in range(num_tokens - 20 - num_streams - 20):
        num_events += len(engine.step())
    seconds, after = time.monotonic() - started, cpu_ns([os.getpid()])
    spent = sum(value - before.get(key, 0) for key, value in after.items())
    tokenizer.close()
    return {"seconds": seconds, "chunks": num_events, "engine": spent / num_events / 1000}


@contextmanager
def app(model: str, num_seqs: int, threads: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Run the HTTP application under uvicorn in a process; yield its port and process."""
    port = free_port()
    command = [sys.executable, __file__, "app-here", model, str(num_seqs), str(threads), str(port)]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server = Running(command, Path(log.name), port)
        try:
            server.wait_until_healthy()
            yield port, {"path": server.process.pid}
        finally:
            server.end()


def run_app(model: str, num_seqs: str, threads: str, port: str) -> None:
    """Be that process."""
    import uvicorn

    server = Server(ServeArgs(model=model, max_num_seqs=int(num_seqs), num_threads=int(threads)))
    uvicorn.run(server.app(), port=int(port), log_level="warning", access_log=False)


@contextmanager
def serve(
    model: str, num_seqs: int, threads: int, **env: str
) -> Iterator[tuple[int, dict[str, int]]]:
    """Run ``moeyard serve``; yield its port and the processes on the path of a token."""
    port = free_port()
    options = ["--max-num-seqs", str(num_seqs), "--num-threads", str(threads)]
    command = [str(BIN / "moeyard"), "serve", model, "--port", str(port), *options]
    with tempfile.TemporaryDirectory(prefix="tp") as folder:
        env = {"RAY_TMPDIR": folder, **env}
        server = Running(command, Path(folder) / "log", port, **env)
        try:
            server.wait_until_ready()
            names = {name_of(int(pid)): int(pid) for pid in server.members()}
            proxy = next(pid for name, pid in names.items() if name.startswith("ray::Proxy"))
            yield port, {"path": server.replicas()[0], "proxy": proxy}
        finally:
            server.stop()


def ask(
    port: int, name: str, num_streams: int, num_tokens: int, pids: dict[str, int]
) -> dict[str, Any]:
    """Have the client measure; return figures per chunk, in microseconds."""
    body = {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    command = [sys.executable, str(HERE / "token_path_client.py"), str(port), json.dumps(body)]
    command += [str(num_streams), *map(str, pids.values())]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["texts"] == 1, "streams of one prompt differ"
    chunks = found["chunks"]
    result = {key: found[key] for key in ("seconds", "chunks", "reads")}
    for part, pid in pids.items():
        spent = sorted(found["cpu_ns"][str(pid)].values())
        if part == "path":
            result["engine"] = spent.pop() / chunks / 1000
        result[part] = sum(spent) / chunks / 1000
    return result


def line(arm: str, num_streams: int, result: dict[str, Any]) -> str:
    """Word a result."""
    rate = result["chunks"] / result["seconds"]
    cpu = "  ".join(
        f"{part} {result[part]:7.1f}" for part in ("engine", "path", "proxy") if part in result
    )
    return (
        f"{arm:12} {num_streams:3} streams {rate:8.0f} tokens/s "
        f"{num_streams / rate * 1000:7.3f} ms a token   CPU us per chunk: {cpu}"
    )


def main() -> None:
    """Measure the arms one after the other, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env", nargs="*", default=[], help="NAME=VALUE for moeyard serve")
    parser.add_argument("--label", default="", help="what is special about this run")
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.json")
    args = parser.parse_args()
    results = []

    def note(arm: str, num_streams: int, result: dict[str, Any]) -> None:
        results.append({"arm": arm, "streams": num_streams, **result})
        print(line(arm, num_streams, result), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "demo-shape")
        if args.model is None:
            write_demo_model(Path(model))
        if "engine" in args.arms:
            for num_streams in [n for _ in range(args.rounds) for n in args.streams]:
                note(
                    "engine",
                    num_streams,
                    bare_engine(model, num_streams, args.tokens, args.threads),
                )
        for arm, start, options in (("app", app, {}), ("serve", serve, _pairs(args.env))):
            if arm in args.arms:
                with start(model, max(args.streams), args.threads, **options) as (port, pids):
                    for num_streams in [1, *(n for _ in range(args.rounds) for n in args.streams)]:
                        note(
                            arm,
                            num_streams,
                            ask(port, Path(model).name, num_streams, args.tokens, pids),
                        )
    if args.write:
        write_results(args.write, {"label": args.label, "results": results})


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["app-here"]:
        run_app(*sys.argv[2:])
    else:
        main()
