"""Serving with 5 % of the experts in memory while the disk misbehaves.

    python scripts/chaos/offload_reads.py [SEED]

Each row sends 8 requests together, half of them as streams, under one fault, and again when it is
over. An answer is whole and equal to that of a good disk, or an error: 503 with Retry-After, or an
error event. Afterwards all are equal, /health says 200 and no place is held. Every row has 60 s.
All rows run twice: reads by C++, which calls what a row puts in place of ``os.preadv``, and by
Python. Exits with 1 on a fault.
"""

import asyncio
import errno
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.engine import thread as engine_thread
from moeyard.serving.experts.tiers.disk import DiskTier
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from bounded import finish, scratch
from http_calls import client_of
from reading_paths import use
from small_model import CONFIG, write_random_model

LIMIT_S = 60
PROMPTS = ["a", "bc", "The", "12 x", "?", "def f(x):", "zebra", "  "]
MOE = MoEConfig(num_experts=40, d_expert=20, router=TopK(k=2))
ARGS = {"expert_memory": "5%", "dtype": "bfloat16", "served_model_name": "m"}
read = os.preadv


async def ask(client: Any, index: int) -> tuple[str, str]:
    """Return ``text`` or ``error``, and what was said."""
    body = {"model": "m", "prompt": PROMPTS[index], "max_tokens": 12, "temperature": 0}
    if index % 2 == 0:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code == 200:
            return "text", answer.json()["choices"][0]["text"]
        assert answer.status_code == 503, answer.text
        message = answer.json()["error"]["message"]
        assert "not finite" in message or int(answer.headers["retry-after"]) > 0, answer.headers
        return "error", message
    answer = await client.post("/v1/completions", json={**body, "stream": True})
    *chunks, done = [line[6:] for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and done == "[DONE]", answer.text
    found = [json.loads(chunk) for chunk in chunks]
    errors = [chunk["error"]["message"] for chunk in found if "error" in chunk]
    if errors:
        return "error", errors[0]
    return "text", "".join(chunk["choices"][0]["text"] for chunk in found)


async def ask_all(server: Server) -> list[tuple[str, str]]:
    async with client_of(server.app()) as client:
        asked = [ask(client, index) for index in range(len(PROMPTS))]
        answers = await asyncio.wait_for(asyncio.gather(*asked), LIMIT_S)
        health = await client.get("/health")
    assert server.admission.num_open == 0, "a place is still held"
    assert health.status_code == 200, health.text
    return list(answers)


@contextmanager
def reading(function: Any) -> Iterator[None]:
    os.preadv = function
    try:
        yield
    finally:
        os.preadv = read


def short(descriptor: int, buffers: Any, offset: int) -> int:
    return read(descriptor, [buffers[0][:97]], offset)


def slow(descriptor: int, buffers: Any, offset: int) -> int:
    time.sleep(0.005)
    return read(descriptor, buffers, offset)


def failing(rate: float, draw: random.Random) -> Any:
    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if draw.random() < rate:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    return fail


@contextmanager
def one_expert() -> Iterator[None]:
    """Let every read of one expert fail."""
    good = ModelFolder.expert_reads

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def reads(folder: ModelFolder, layer: int, expert: int, *more: Any) -> Any:
        return [fail] if (layer, expert) == (0, 7) else good(folder, layer, expert, *more)

    with MonkeyPatch.context() as patch:
        patch.setattr(ModelFolder, "expert_reads", reads)
        patch.setattr(DiskTier, "straight", lambda *_: None)  # all reads come to it
        yield


@contextmanager
def hanging() -> Iterator[None]:
    """Let reads hang for 3 s."""
    goes_on = threading.Event()
    timer = threading.Timer(3, goes_on.set)
    timer.start()

    def hang(descriptor: int, buffers: Any, offset: int) -> int:
        goes_on.wait()
        return read(descriptor, buffers, offset)

    with reading(hang):
        yield
    timer.join()


@contextmanager
def changed(weights: Path, how: str) -> Iterator[None]:
    """Change the weights' file under the open server, and change it back."""
    original = weights.with_suffix(".original")
    shutil.copyfile(weights, original)
    if how == "replaced":
        shutil.copyfile(weights, weights.with_suffix(".new"))
        os.truncate(weights.with_suffix(".new"), 10)
        weights.with_suffix(".new").replace(weights)
    elif how == "deleted":
        weights.unlink()
    elif how == "bit":
        data = bytearray(weights.read_bytes())
        data[int.from_bytes(data[:8], "little") + 8 + 100] ^= 1  # experts come first
        overwrite(weights, bytes(data))
    elif how == "NaN":
        data = bytearray(weights.read_bytes())
        data[len(data) // 3 :] = b"\xff" * (len(data) - len(data) // 3)
        overwrite(weights, bytes(data))
    else:
        os.truncate(weights, {"half": weights.stat().st_size // 2, "empty": 0}[how])
    try:
        yield
    finally:
        if how in ("replaced", "deleted"):
            original.replace(weights)
        else:
            overwrite(weights, original.read_bytes())


def overwrite(path: Path, data: bytes) -> None:
    """Write in place: the server holds the file open."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def main() -> None:
    seed = int(sys.argv[1]) if sys.argv[1:] else 1
    print(f"seed {seed}")
    faults: list[str] = []
    num_rows = 0
    for way in ("native", "python"):
        print(f"reads by {way}")
        with MonkeyPatch.context() as patch, contextmanager(use)(way, patch):
            num_rows += run_rows(seed, faults)
    finish("misbehaving disks", faults, num_rows)


def run_rows(seed: int, faults: list[str]) -> int:
    """Run all rows, add the names of those with a fault, and return how many there are."""
    with scratch() as space:
        folder = space / "m"
        write_random_model(folder, CONFIG.model_copy(update={"moe": MOE}))
        weights, draw = folder / "model.safetensors", random.Random(seed)
        server = Server(ServeArgs(model=str(folder), **ARGS))
        good = asyncio.run(ask_all(server))
        assert all(kind == "text" for kind, _ in good), good
        rows = {
            "short reads": (reading(short), 8),
            "slow reads": (reading(slow), 8),
            "one expert unreadable": (one_expert(), None),
            "EIO, 20 % of reads": (reading(failing(0.2, draw)), None),
            "EIO, every second read": (reading(failing(0.5, draw)), None),
            "EIO, every read": (reading(failing(1.0, draw)), 0),
            "reads hang for 3 s": (hanging(), 8),
            "file cut to half": (changed(weights, "half"), None),
            "file cut to nothing": (changed(weights, "empty"), 0),
            "file replaced": (changed(weights, "replaced"), 8),
            "file deleted": (changed(weights, "deleted"), 8),
            "experts are NaN": (changed(weights, "NaN"), None),
            "a bit flipped": (changed(weights, "bit"), None),
        }
        for name, (fault, expected) in rows.items():
            if not row(name, server, good, fault, expected, folder):
                faults.append(name)
            if name in ("file replaced", "file deleted", "experts are NaN"):
                server.close()  # its file is not the one in the folder, or its slots hold NaN
                server = Server(ServeArgs(model=str(folder), **ARGS))
        server.close()
    assert engine_thread.STUCK_AFTER_S > LIMIT_S
    return len(rows)


def row(
    name: str,
    server: Server,
    good: list[tuple[str, str]],
    fault: Any,
    expected: int | None,
    folder: Path,
) -> bool:
    """Run one row; ``expected`` is how many answers must be whole, None for any number."""
    started = time.monotonic()
    try:
        with fault:
            answers = asyncio.run(ask_all(server))
        seconds = time.monotonic() - started
        whole = sum(kind == "text" for kind, _ in answers)
        other = sum(a[0] == "text" and a != b for a, b in zip(answers, good, strict=True))
        reasons = {message for kind, message in answers if kind == "error"}
        is_good = other == 0 and expected in (None, whole)
        if name == "experts are NaN":  # what is in memory stays there until it is put out
            server.close()
            server = Server(ServeArgs(model=str(folder), **ARGS))
        is_equal_again = asyncio.run(ask_all(server)) == good
    except (AssertionError, TimeoutError) as error:
        print(f"{name:24} FAULT {type(error).__name__} {str(error)[:200]}", flush=True)
        return False
    print(
        f"{name:24} {seconds:5.1f} s  {whole} whole, {8 - whole} errors, {other} with other text, "
        f"{'equal' if is_equal_again else 'OTHER'} afterwards  {' '.join(sorted(reasons))[:110]}",
        flush=True,
    )
    return is_good and is_equal_again


if __name__ == "__main__":
    main()
