"""The last error of a rank: printed once on each host, and written where torchrun looks for it.

torchrun ends with a table of the workers that failed. The table shows what each worker's error file
holds, so it is the last thing a person sees.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def say_last(sentence: str) -> None:
    """Print an error, unless another rank of this host has printed the same one."""
    error_file = os.environ.get(ERROR_FILE)
    if error_file is not None:
        path = Path(error_file)
        _leave_for_torchrun(path, sentence)
        if not _is_first(path.parent.parent, sentence):
            return
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()


def _leave_for_torchrun(path: Path, sentence: str) -> None:
    """Write torchrun's error file, whose format is that of ``multiprocessing.errors.record``."""
    extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    try:
        path.write_text(
            json.dumps({"message": {"message": sentence, "extraInfo": extra}}), encoding="utf-8"
        )
    except OSError as error:
        sys.stderr.write(f"torchrun's {path} cannot be written: {error.strerror}\n")


def _is_first(attempt: Path, sentence: str) -> bool:
    """Say whether this rank is the first of its host and attempt with the sentence; mark it."""
    name = f"said-{hashlib.sha256(sentence.encode()).hexdigest()[:16]}"
    try:
        os.close(os.open(attempt / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never
    return True
