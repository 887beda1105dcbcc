"""The three arms of token_path.py: the bare engine, the application in one process, the server."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from token_path_client import cpu_ns

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routers.topk import TopK
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serving"))
from server_process import BIN, Running, free_port, name_of
from small_model import write_decoder

PROMPT = "def main(argument):"


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
    command = [sys.executable, __file__, model, str(num_seqs), str(threads), str(port)]
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


if __name__ == "__main__":
    run_app(*sys.argv[1:])
