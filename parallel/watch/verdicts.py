"""The sentences about ranks that others wait for."""

import time

from .peers import BEAT_S, Peer
from .pulse import pulse

SILENT_S = 5 * BEAT_S
"""Seconds without a beat after which the whole process counts as stopped, not just its main
thread."""


def missing(ranks: list[int], timeout_s: float) -> str:
    """Say which ranks have not joined."""
    names = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
    return (
        f"{names} did not appear within parallel.timeout_s = {timeout_s:g}; see the log there or "
        "raise the limit."
    )


def ended(peer: Peer, here: int) -> str:
    """Say whose connection has ended; rank ``here`` says it."""
    waits = _waiting(here)
    return (
        f"{peer.where} ended without a word{waits}, last heard of {peer.doing}, as after kill -9, "
        "a crash or a lack of memory; see its log and start again."
    )


def held_up(peer: Peer, timeout_s: float, here: int) -> str:
    """Say which rank let the limit pass, and whether it still beats."""
    limit, waits = f"parallel.timeout_s = {timeout_s:g}", _waiting(here)
    if time.monotonic() - peer.heard > SILENT_S:
        return (
            f"{peer.where} fell silent, last heard of {peer.doing}, and let {limit} pass{waits}: "
            "it is stopped, or its host is; see there, or raise the limit, and start again."
        )
    return (
        f"{peer.where} has not moved for {limit} {peer.doing}{waits}, and others wait for it; see "
        "there what holds it, or raise the limit, and start again."
    )


def late(names: list[str], doing: str, timeout_s: float, here: int) -> str:
    """Name the ranks whose collectives have not given up when those of all others have."""
    limit = f"parallel.timeout_s = {timeout_s:g}"
    if not names:
        return (
            f"all ranks waited for each other longer than {limit}{_waiting(here)}; look at the "
            "network between their hosts, or raise the limit, and start again."
        )
    return (
        f"{', '.join(names)} kept the others waiting longer than {limit} {doing}; see there what "
        "holds it, or raise the limit, and start again."
    )


def _waiting(here: int) -> str:
    """Say in which collective this rank waits, if in any."""
    collective = pulse.collective
    return "" if collective is None else f" while rank {here} waited in {collective}"
