"""Network namespaces, links of a given rate and their byte counters, by iproute2's ip and tc.

Every namespace has a name that begins with ``PREFIX``, so that what a killed run left is found.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from moeyard.errors import ConfigError, MoeyardError

PREFIX = "moeyard-bed-"
MTU = 9000
"""Bytes of a frame: jumbo frames, as in clusters, and fewer to handle for the same cores."""
BUCKET_S = 100e-6
"""A link that was idle sends this much at once. A larger bucket would let small messages through
at no cost; a smaller one costs a timer for every frame."""
QUEUE_BYTES = 64 << 20
"""A link drops what does not fit. The senders' limit keeps far below it: fabrics lose nothing."""
UNSENT_BYTES = 128 << 10
"""A connection has at most about this much in the queues of all links. Linux allows 4 MB, behind
which a small message of another connection would wait for 32 ms at 1 Gbit/s. With 4 MB and queues
of 20 ms, links of 200 Mbit/s dropped 3,428 frames in the measurement of network.py; now none."""
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    **dict.fromkeys(("nsenter", "setpriv", "unshare"), "util-linux"),
}
"""Programs and the Debian packages that have them."""
ENDS_S = 5.0
"""Killed processes are gone after this time."""


def bits_per_s(rate: str) -> float:
    """Return the bits per second of a rate such as ``1gbit``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"the rate is {rate!r}; write a number and kbit, mbit or gbit: '1gbit'.")
    return float(found[1]) * UNITS[found[2]]


def stop_unless_permitted() -> None:
    """Raise a sentence unless this process may make namespaces and has the programs for it."""
    if os.geteuid() != 0:
        raise MoeyardError("namespaces and links need root; start this as root.")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise MoeyardError(f"{tool} is missing; install Debian's package {package}.")


def use(*command: str) -> str:
    """Run a command and return its output; its own complaint is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise MoeyardError(
            f"{' '.join(command)!r} failed ({reason}); this kernel or container does not permit it."
        )
    return done.stdout


def add_namespace(name: str) -> None:
    """Make a network namespace in which only the loopback is up."""
    use("ip", "netns", "add", name)
    use("ip", "-n", name, "link", "set", "lo", "up")
    limit = f"echo {UNSENT_BYTES} > /proc/sys/net/ipv4/tcp_limit_output_bytes"
    use("nsenter", f"--net=/run/netns/{name}", "sh", "-c", limit)


def add_switch(name: str) -> None:
    """Make a namespace that forwards frames between the links that :func:`plug` puts into it."""
    add_namespace(name)
    use("ip", "-n", name, "link", "add", "switch", "type", "bridge")
    use("ip", "-n", name, "link", "set", "switch", "mtu", str(MTU), "addrgenmode", "none", "up")


def connect(one: tuple[str, str], other: tuple[str, str], rate: str) -> None:
    """Join two namespaces by a link, full duplex; an end is (namespace, name of its device)."""
    (space, device), (far_space, far_device) = one, other
    peer = ("peer", "name", far_device, "netns", far_space)
    use("ip", "link", "add", device, "netns", space, "type", "veth", *peer)
    bits = bits_per_s(rate)
    bucket_bytes = max(2 * MTU, round(bits / 8 * BUCKET_S))
    for name, end in (one, other):
        # Without addresses of IPv6, gloo has one address to choose, and idle links stay silent.
        use("ip", "-n", name, "link", "set", end, "mtu", str(MTU), "addrgenmode", "none")
        shape = ("rate", rate, "burst", str(bucket_bytes), "limit", str(QUEUE_BYTES))
        use("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *shape)
        use("ip", "-n", name, "link", "set", end, "up")


def plug(switch: str, device: str) -> None:
    """Make a device of a switch's namespace one of its ports."""
    use("ip", "-n", switch, "link", "set", device, "master", "switch")


def set_address(name: str, device: str, address: str) -> None:
    """Give a device its address in a network of 254."""
    use("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)


def read_bytes(name: str, device: str) -> tuple[int, int]:
    """Return the bytes that a device has sent and received."""
    (link,) = json.loads(use("ip", "-n", name, "-s", "-j", "link", "show", "dev", device))
    counters = link["stats64"]
    return int(counters["tx"]["bytes"]), int(counters["rx"]["bytes"])


def read_dropped(name: str, device: str) -> int:
    """Return the frames that a device dropped because its queue was full."""
    (queue,) = json.loads(use("tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device))
    return int(queue["drops"])


def remove_namespaces() -> None:
    """Kill the processes in this file's namespaces and remove these; also what others left."""
    names = [path.name for path in Path("/run/netns").glob(f"{PREFIX}*")]
    deadline = time.monotonic() + ENDS_S
    while pids := [pid for name in names for pid in use("ip", "netns", "pids", name).split()]:
        if time.monotonic() > deadline:
            raise MoeyardError(f"process {pids[0]} does not end; look at it and start again.")
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:  # it has ended since
                continue
        time.sleep(0.02)
    for name in names:
        use("ip", "netns", "del", name)
