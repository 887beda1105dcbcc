"""The shared memory that Ray's object store needs for copies of experts. Imports no Ray."""

import os
from pathlib import Path

from ....errors import ConfigError

FOLDER = Path("/dev/shm")
"""Where Ray puts its object store on Linux; elsewhere in a file, if there is too little here."""
SPARE_BYTES = 512 << 20
"""Of the object store, for copies on their way and for Ray Serve."""


def object_store_bytes(host_bytes: int) -> int:
    """Return how large Ray's object store must be to hold ``host_bytes`` of experts."""
    return host_bytes + SPARE_BYTES


def check_shared_memory(host_bytes: int) -> None:
    """Raise :class:`ConfigError` if the system has less shared memory than copies need."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return  # not Linux: Ray says what it thinks
    free, needed = found.f_bavail * found.f_frsize, object_store_bytes(host_bytes)
    if free < needed:
        raise ConfigError(
            f"host-memory is {host_bytes} bytes, which takes {needed} of {FOLDER}, but that has "
            f"{free} free; give less, or enlarge it (docker run --shm-size={needed})."
        )
