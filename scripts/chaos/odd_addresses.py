"""Do tests that compare with transformers hold wherever its weights lie in memory?

    python scripts/chaos/odd_addresses.py

Runs them with transformers' weights 4, 16 and 32 bytes behind a cache line and 1 and 2 threads:
BLAS picks other code there, whose last digits differ. pytest loads this file as a plugin. Exits 1
where a test fails.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OFFSET = "ODD_ADDRESSES_OFFSET"
TESTS = (
    "tests/moe/test_families.py::test_what_we_write_opens_in_transformers_with_the_same_logits",
    "tests/moe/test_model_writer.py",
    "tests/moe/test_with_compressed_tensors.py",
)
LINE_BYTES = 64


def pytest_configure() -> None:
    """Move the weights of every model that transformers opens."""
    from transformers import PreTrainedModel

    open_model = PreTrainedModel.from_pretrained.__func__

    def moved(cls: Any, *arguments: Any, **options: Any) -> Any:
        found = open_model(cls, *arguments, **options)
        _move(found[0] if isinstance(found, tuple) else found, int(os.environ[OFFSET]))
        return found

    PreTrainedModel.from_pretrained = classmethod(moved)


def _move(model: Any, offset: int) -> None:
    import torch

    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 2 * LINE_BYTES, dtype=parameter.dtype)
        skip = (offset - room.data_ptr()) % LINE_BYTES // room.element_size()
        place = room[skip : skip + parameter.numel()].view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
        assert parameter.data_ptr() % LINE_BYTES == offset


def main() -> None:
    """Run the tests at every offset."""
    failed = False
    for offset in (4, 16, 32):
        for threads in (1, 2):
            around = {**os.environ, OFFSET: str(offset), "OMP_NUM_THREADS": str(threads)}
            around["PYTHONPATH"] = str(Path(__file__).parent)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "odd_addresses", *TESTS]
            done = subprocess.run(command, env=around, cwd=ROOT, capture_output=True, text=True)
            print(f"{offset} bytes, {threads} threads: {done.stdout.splitlines()[-1]}", flush=True)
            failed |= done.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
