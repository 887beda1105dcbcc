"""Stand-ins for the hardware of a machine."""

import dataclasses

from moeyard.kernels import experts


def pretend_there(monkeypatch, name: str) -> None:
    """Make a backend say that it can run on every device."""
    there = dataclasses.replace(experts.BACKENDS[name], why_not=lambda device: None)
    monkeypatch.setitem(experts.BACKENDS, name, there)
