"""A worker that was ordered as a spare imports what a replica needs; others import nothing."""

import os
import subprocess
import sys

from moeyard.serving.cluster.guardian import SPARE_ORDER
from moeyard.serving.cluster.warm_up import NEEDED

WATCHED = """
import importlib, sys
found = []
importlib.import_module = found.append
import moeyard.serving.cluster.warm_up
assert not {"torch", "ray", "transformers"} & set(sys.modules), "a worker for anything else is slow"
print(*found)
"""


def imported(**env) -> list[str]:
    """Return what a worker process imports because of its preloaded module."""
    command = [sys.executable, "-c", WATCHED]
    clean = {name: value for name, value in os.environ.items() if name != SPARE_ORDER}
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_one_worker_takes_an_order_and_all_others_import_nothing(tmp_path):
    order = tmp_path / "order"
    assert imported() == []
    assert imported(**{SPARE_ORDER: str(order)}) == []
    order.touch()
    assert imported(**{SPARE_ORDER: str(order)}) == list(NEEDED)
    assert not order.exists()
    assert imported(**{SPARE_ORDER: str(order)}) == []
