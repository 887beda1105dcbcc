"""Tokens per second of ``moeyard serve`` and of transformers' own server, side by side.

    python benchmarks/offloading_models.py FOLDER 1b
    python -m venv /tmp/peer && /tmp/peer/bin/pip install 'transformers[serving]'
    python benchmarks/serving_peers.py FOLDER/1b --peer-python /tmp/peer/bin/python --write

Both servers have the same model in the same type, all cores, the same prompts, greedy decoding and
an answer of a fixed length (no end token). Tokens are those that each server reports in ``usage``.
At each concurrency, as many clients ask again as soon as they are answered. The servers take turns,
in an order that alternates; transformers' is stopped by a signal while it is not its turn. It is
asked in both of its ways, one request after the other and with continuous batching, and the better
one counts.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
from serving_bed import free_port, served

from report import write_results

SEED = 5
START_S = 600.0
PEERS = {"transformers": [], "transformers, batching": ["--continuous-batching"]}


@contextmanager
def without_end(model: Path) -> Iterator[Path]:
    """Make a folder of the same model whose configuration names no end token."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / model.name
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        for name in ("config.json", "generation_config.json"):
            values = json.loads((model / name).read_text())
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(values | {"eos_token_id": None}))
        yield folder


class Server:
    """A server under measurement."""

    def __init__(self, base: str, model: str, more: dict[str, object], pid: int | None) -> None:
        self._url = f"{base}/v1/completions"
        self._body = {"model": model, "temperature": 0, **more}
        self._pid = pid
        """Of a process that is stopped between its turns."""

    def send(self, number: signal.Signals) -> None:
        """Stop or continue it, if it is one process."""
        if self._pid is not None:
            os.kill(self._pid, number)

    async def speed(self, prompts: list[str], clients: int, tokens: int) -> float:
        """Return the tokens per second of so many clients that share the prompts."""
        left = iter(prompts)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def ask() -> int:
                count = 0
                for prompt in left:
                    body = {**self._body, "prompt": prompt, "max_tokens": tokens}
                    async with session.post(self._url, json=body) as answer:
                        content = await answer.read()
                    assert answer.status == 200, content
                    found = json.loads(content)["usage"]["completion_tokens"]
                    assert found == tokens, f"{found} tokens came of {tokens}"
                    count += found
                return count

            started = time.monotonic()
            counts = await asyncio.gather(*(ask() for _ in range(clients)))
            return sum(counts) / (time.monotonic() - started)


@contextmanager
def peer(python: Path, folder: Path, threads: int, *options: str) -> Iterator[Server]:
    """Run transformers' server until the block ends."""
    port = free_port()
    command = [str(python), "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [str(folder), "--device", "cpu", "--port", str(port), "--host", "127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *options], env=env, stdout=log, stderr=log)
        try:
            base = f"http://127.0.0.1:{port}"
            _wait(base, process, log)
            yield Server(base, str(folder), {}, process.pid)
        finally:
            process.kill()
            process.wait()


def _wait(base: str, process: subprocess.Popen, log) -> None:
    async def is_up() -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{base}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    deadline = time.monotonic() + START_S
    while not asyncio.run(is_up()):
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise RuntimeError(f"the peer did not start: {log.read()[-2000:]}")
        time.sleep(0.5)


def random_prompts(count: int, length: int, turn: int) -> list[str]:
    """Return prompts of so many letters; no two begin alike, so nothing is reused."""
    chance = random.Random(f"{SEED} {turn}")
    return ["".join(chance.choices("abcdefgh ", k=length)) for _ in range(count)]


def measure(servers: dict[str, Server], clients: int, options: argparse.Namespace) -> dict:
    """Return each server's tokens per second at one concurrency, turn by turn."""
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(options.turns + 1):  # the first one is for warming up
        prompts = random_prompts(clients * options.each, options.prompt, turn)
        names = sorted(servers, reverse=turn % 2 == 1)
        for name in names:
            servers[name].send(signal.SIGCONT)
            found = asyncio.run(servers[name].speed(prompts, clients, options.tokens))
            servers[name].send(signal.SIGSTOP)
            if turn > 0:
                speeds[name].append(found)
        print(f"  {clients} clients, turn {turn} of {options.turns}", flush=True)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    best = max(PEERS, key=lambda name: medians[name])
    ratios = [a / b for a, b in zip(speeds["moeyard"], speeds[best], strict=True)]
    shown = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
    print(f"{clients} clients, tokens/s: {shown}")
    print(f"  moeyard / {best}: {statistics.median(ratios):.2f}", flush=True)
    return {"tokens_per_s": speeds, "best_peer": best, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--peer-python", type=Path, required=True, metavar="PATH")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--each", type=int, default=2, help="requests of a client in a turn")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--prompt", type=int, default=64, help="letters of a prompt")
    parser.add_argument("--peer-option", action="append", default=[], help="for batching alone")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    ours = ["--num-threads", str(threads), "--max-num-seqs", str(max(options.clients))]
    with ExitStack() as stack:
        folder = stack.enter_context(without_end(options.model))
        servers: dict[str, Server] = {}
        for name, more in PEERS.items():
            more = [*more, *options.peer_option] if more else more
            servers[name] = stack.enter_context(peer(options.peer_python, folder, threads, *more))
            servers[name].send(signal.SIGSTOP)
        running = stack.enter_context(served(options.model, 1, *ours))
        own = {"ignore_eos": True}
        servers["moeyard"] = Server(running.base, options.model.name, own, None)
        found = {str(n): measure(servers, n, options) for n in options.clients}
    if options.write:
        shape = {"tokens": options.tokens, "prompt": options.prompt, "each": options.each}
        print(write_results("serving_peers", {"model": options.model.name, **shape, **found}))


if __name__ == "__main__":
    main()
