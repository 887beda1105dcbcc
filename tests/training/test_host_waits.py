"""How often the host waits for a GPU in a step of training and of decoding; without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from moeyard.kernels.values import memory

from launch import run

SCRIPT = Path(__file__).with_name("host_waits.py")
COUNTS = ["_to_copy.default fgpu->cpu", "moe/routers/losses.py:<lambda>"]
ROWS = ["to_host", "parallel/experts/all_to_all.py:_dispatch"]
"""Of each layer."""
LOGITS = ["to.dtype_layout fgpu->cpu", "moe/models/generation.py:continue_rows"]
EXPECTED = {
    "train topk": [COUNTS],
    "train sequence balance, bias and groups": [COUNTS],
    "train windows and sinks": [COUNTS],
    "train with rows that travel": [ROWS, ROWS, COUNTS],
    "decode": [LOGITS],
}


@pytest.fixture(scope="module")
def found():
    lines = run([sys.executable, str(SCRIPT)], 120).splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))


@pytest.mark.parametrize("case", EXPECTED)
def test_the_host_waits_for_a_gpu_only_where_it_needs_numbers(found, case):
    """Once for the counts of a whole step, once in each layer whose rows travel, and once for the
    logits of a decoding step."""
    assert found[case] == EXPECTED[case]


def test_what_goes_to_a_gpu_is_pinned_so_that_the_host_need_not_wait(monkeypatch):
    calls = []

    class Host(torch.Tensor):
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device.type, non_blocking))
            return self

    host = torch.zeros(3).as_subclass(Host)
    memory.to_device(host, torch.device("cuda", 0))
    memory.to_device(host, torch.device("cpu"))
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]
