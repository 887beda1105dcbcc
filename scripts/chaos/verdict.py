"""How the scripts of this folder say what held, and how they end."""

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import environment


class Verdict:
    """Prints checks, and ends the script with 1 after a fault."""

    def __init__(self) -> None:
        self.num_checks = 0
        self.num_faults = 0
        self._started = time.monotonic()
        facts = environment()
        versions = facts["versions"]
        self.say(f"$ {facts['command']}")
        self.say(
            f"({facts['cores']} cores, {facts['cpu']}; Python {facts['python']}, torch "
            f"{versions['torch']}, Ray {versions['ray']}; commit {facts['commit']}; load "
            f"{facts['load_average'][0]:.0f} before the start)"
        )

    def say(self, text: str) -> None:
        """Print a line now."""
        print(text, flush=True)

    def check(self, what: str, holds: bool, facts: object = "") -> None:
        """Print and note whether something held."""
        self.num_checks += 1
        if not holds:
            self.num_faults += 1
        self.say(f"{'ok   ' if holds else 'FAULT'} {what:42} {facts}".rstrip())

    def end(self) -> None:
        """Print the sum and leave."""
        seconds, load = time.monotonic() - self._started, os.getloadavg()[0]
        self.say(
            f"{self.num_checks} checks, {self.num_faults} faults, {seconds:.0f} s, "
            f"load {load:.1f} at the end"
        )
        sys.exit(1 if self.num_faults else 0)
