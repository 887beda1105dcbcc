"""Who can reach which port of a running server?

    python scripts/chaos/server_ports.py

Every TCP socket that a process of the server listens on must be on 127.0.0.1 and its process in
SECURITY.md's list, no port may answer on this machine's other addresses, and what answers plain
HTTP without any token may be no more than SECURITY.md says.
"""

import http.client
import re
import socket
import subprocess
import urllib.error
import urllib.request

from verdict import Verdict
from with_server import ROOT, listeners, served

OPEN = {"ray::ProxyActor", "ray::DashboardAgent", "monitor", "dashboard"}
"""Answer something without a token: health and routes; Ray's metrics."""


def other_addresses() -> list[str]:
    """Return this machine's addresses but the loopback's."""
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    return [word for word in done.stdout.split() if not word.startswith(("127.", "::1"))]


def status_of(port: int) -> str:
    """Return what a plain GET /metrics is answered with."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return f"{answer.status}, {len(answer.read())} bytes"
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def is_reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def main() -> None:
    verdict = Verdict()
    listed = set(re.findall(r"^\| `(\S+)` \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE))
    others = other_addresses()
    with served("--api-key", "secret", "--replicas", "2") as running:
        found = sorted(listeners([int(pid) for pid in running.members()]))
        for name, address, port in found:
            kind = (
                "--port" if port == running.port else port if port in (44217, 44227) else "random"
            )
            answer = status_of(port)
            verdict.say(f"     {name:<24}{address:<12}{kind!s:<8}GET /metrics: {answer}")
            if answer.startswith("200"):
                verdict.check(f"{name} may answer without a token", name in OPEN)
        verdict.check("all on the loopback", {address for _, address, _ in found} == {"127.0.0.1"})
        unknown = {name for name, _, _ in found} - listed
        verdict.check("all in SECURITY.md", not unknown, unknown or "")
        reached = [port for _, _, port in found for other in others if is_reached(other, port)]
        verdict.check(f"none on {len(others)} other addresses", not reached, reached or "")
    verdict.end()


if __name__ == "__main__":
    main()
