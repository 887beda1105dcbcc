"""An owner as a plain process: it reads an :class:`OwnerSpec` as JSON from standard input.

It writes its address as a line of JSON once it is ready, and ends when standard input does, so
with the process that started it.
"""

import json
import os
import sys
import threading

from .connecting import Listener
from .owner import Owner
from .owner_spec import OwnerSpec


def main() -> None:
    """Serve a leader until the process that started this one ends."""
    spec = OwnerSpec.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_input, name="end", daemon=True).start()
    owner = Owner(spec)
    listener = Listener(bytes.fromhex(spec.secret), spec.leaders_host)
    sys.stdout.write(json.dumps(listener.address) + "\n")
    sys.stdout.flush()
    owner.serve(listener)


def _end_with_input() -> None:
    # Not Linux's signal at the parent's death: that comes when the thread ends that started us.
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
