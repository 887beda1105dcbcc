"""The three arms of token_path.py: the bare engine, the application in one process, the server."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from token_path_client import COUNTS, WARM_CHUNKS, Counts, counts_of, differences

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

PROMPT = "def main{}(argument):"
"""With a stream's number: rows of equal texts would choose equal experts, but only in the engine,
where all streams begin in the same step."""
BLANK = "\u0120"
"""How tokenizers of bytes spell a space."""


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


def write_spelled(model: Path, folder: Path) -> None:
    """Link a model's files into ``folder``, with a tokenizer whose every id is a word.

    Random weights choose bytes that are half characters, which are no chunk. Their names here are;
    nothing else changes. For tokenizers that name an id by its bytes, such as BPE.
    """
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    values = json.loads((model / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    special = {token["id"] for token in values["added_tokens"]}
    values["model"]["vocab"] = {
        word if word.isascii() or word == BLANK or index in special else f"t{index}": index
        for word, index in words.items()
    }
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(values))


@contextmanager
def engine_of(model: str, num_streams: int, num_tokens: int = 4000) -> Iterator[Engine]:
    """Yield an engine whose greedy streams have read their prompts."""
    served, store = open_model(model)
    tokenizer = ServeArgs(model=model).open_tokenizer()
    engine = Engine(served, tokenizer.decode, store, max_num_seqs=num_streams)
    for index in range(num_streams):
        prompt = tuple(tokenizer.encode(PROMPT.format(index)))
        engine.add(
            GenerationRequest(
                str(index), prompt, num_tokens, SamplingParams(temperature=0), ignore_eos=True
            )
        )
    while sum(len(engine.step()) for _ in range(20)) < 20 * num_streams:
        pass  # until every prompt is read
    yield engine
    tokenizer.close()


def bare_engine(model: str, num_streams: int, num_tokens: int, threads: int) -> dict[str, Any]:
    """Run the streams in ``Engine.step`` alone."""
    torch.set_num_threads(threads)
    with engine_of(model, num_streams, num_tokens) as engine:
        started, before = time.monotonic(), counts_of([os.getpid()])
        num_events = 0
        for _ in range(num_tokens - 20 - num_streams - 20):
            num_events += len(engine.step())
        seconds, after = time.monotonic() - started, counts_of([os.getpid()])
    busiest = max(differences(before, after).values())
    return {"seconds": seconds, "chunks": num_events, **engine_figures(busiest, num_events)}


@contextmanager
def engine_turns(
    model: str, num_streams: int, num_tokens: int, threads: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield what runs the streams once, in an engine that stays open between turns."""
    torch.set_num_threads(threads)
    served, store = open_model(model)
    tokenizer = ServeArgs(model=model).open_tokenizer()
    engine = Engine(served, tokenizer.decode, store, max_num_seqs=num_streams)
    prompts = [tuple(tokenizer.encode(PROMPT.format(index))) for index in range(num_streams)]
    numbers = count()

    def turn() -> dict[str, Any]:
        for prompt in prompts:
            drawn = SamplingParams(temperature=0)
            name = str(next(numbers))
            engine.add(GenerationRequest(name, prompt, num_tokens, drawn, ignore_eos=True))
        for _ in range(WARM_CHUNKS):
            engine.step()
        started, num_events = time.monotonic(), 0
        for _ in range(num_tokens - 2 * WARM_CHUNKS):
            num_events += len(engine.step())
        seconds = time.monotonic() - started
        while engine.has_work:
            engine.step()
        return {"seconds": seconds, "chunks": num_events}

    yield turn
    tokenizer.close()


def engine_figures(counts: Counts, num_chunks: int) -> dict[str, float]:
    """Return what the engine's thread spends per chunk."""
    spent = {name: counts[i] / num_chunks for i, name in enumerate(COUNTS)}
    return {"engine": spent.pop("cpu_ns") / 1000, **spent}


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
