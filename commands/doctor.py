"""``moeyard doctor``: what this machine has and which backends pass."""

import argparse
import sys

from .options import Parsers, add_command


def add(parsers: Parsers) -> None:
    """Add the command."""
    doctor = add_command(parsers, "doctor", "show what this machine has and which backends pass")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Return 1 when a backend fails its self-check."""
    import json

    from ..doctor import as_json, as_text, examine

    facts, checks = examine()
    text = json.dumps(as_json(facts, checks), indent=1) + "\n"
    sys.stdout.write(text if arguments.json else as_text(facts, checks))
    return 1 if any(check.failed for check in checks) else 0
