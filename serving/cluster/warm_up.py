"""Imported first by every worker process of our Ray: the spare one gets ready for a replica here.

Ray's ``RAY_preload_python_modules`` names this file. Most of the time between a replica's death and
its successor's first answer goes into starting a process and importing torch, transformers, Ray
Serve and this package. The worker that finds ``spare_worker.py``'s order imports them now, before
it can be given anything; all others import nothing. (Not in a thread: what a worker is given
imports, too, and Python hands out half-imported modules where two threads meet.)
"""

import importlib
import os
from pathlib import Path

from .guardian import SPARE_ORDER

NEEDED = ("moeyard.serving.app", "transformers.models.auto.tokenization_auto")
"""The second one takes as long as torch, and every replica opens a tokenizer with it."""


def _take_order() -> bool:
    """Return whether there was an order; only one process can take it."""
    try:
        Path(os.environ[SPARE_ORDER]).unlink()
    except (KeyError, OSError):
        return False
    return True


if _take_order():
    for name in NEEDED:
        importlib.import_module(name)
