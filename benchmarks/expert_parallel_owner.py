"""An owner of experts for benchmarks/expert_parallel_serving.py, on the disk that all share.

Arguments: the disk's MB/s (0 = as fast as it is) and the file that its readers share. Or ``echo``,
the identity of the leader's host and the secret: it then answers every frame with lines at once.
"""

import json
import sys
from pathlib import Path

import torch
from paced_disk import PacedDisk

from moeyard.serving.expert_parallel.channel import LostPeerError
from moeyard.serving.expert_parallel.connecting import Listener
from moeyard.serving.expert_parallel.frames import Head, Kind
from moeyard.serving.expert_parallel.owner_process import main


def echo(host: str, secret: str) -> None:
    """Answer frames until the leader has gone; a request's ``rows`` are the fp32 lines it wants."""
    listener = Listener(bytes.fromhex(secret), host)
    print(json.dumps(listener.address), flush=True)
    channel = listener.accept(torch.zeros(1, dtype=torch.uint8))
    while True:
        try:
            head, _ = channel.receive()
            channel.send(Head(Kind.LINES, head.number), [torch.zeros(head.rows, 1024)])
        except LostPeerError:
            return


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(*sys.argv[2:])
    else:
        PacedDisk(float(sys.argv[1]) * 1e6 or None, Path(sys.argv[2]))
        main()
