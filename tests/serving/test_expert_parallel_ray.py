"""Owners of experts as Ray actors: ``moeyard serve --expert-parallel 2``, and a kill."""

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from moeyard.serving.loading import open_model

from server_process import listeners, serving

pytestmark = [pytest.mark.server, pytest.mark.slow]
PROMPT = list(range(40, 60))
ACTOR = b"ray::OwnerActor"


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_folder):
    options = ["--expert-parallel", "2", "--expert-memory", "25%"]
    with serving(model_folder, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


def answer(server):
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    body |= {"ignore_eos": True}
    request = urllib.request.Request(
        f"{server.base}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]


def owners_of(server):
    """Return the processes of owners below this server."""
    found = []
    for pid in server.members():
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(ACTOR):
            found.append(int(pid))
    return found


def test_answers_are_those_of_one_process_also_after_an_owner_was_killed(server, model_folder):
    model, _ = open_model(model_folder)
    ids = model.generate(torch.tensor([PROMPT]), 20, temperature=0)[0, len(PROMPT) :].tolist()
    expected = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert answer(server) == expected
    (first,) = owners_of(server)
    os.kill(first, signal.SIGKILL)
    started = time.monotonic()
    assert answer(server) == expected, "the request was not retried"
    print(f"answered {time.monotonic() - started:.1f} s after kill -9 of an owner")
    (second,) = owners_of(server)
    assert second != first
    addresses = {address for _, address, _ in listeners([second])}
    assert addresses == {"127.0.0.1"}, "an owner listens elsewhere"
    totals = server.totals()
    assert totals["moeyard_expert_owner_losses_total"] == 1
    assert totals["moeyard_expert_owner_rows_total"] > 0
