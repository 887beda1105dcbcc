"""Every rank knows whether the others are alive, and names one that is not.

Rank 0 listens and the others connect to it, apart from torch's connections (peers.py). A thread on
each rank sends a beat every second and reads the others'. Rank 0 tells everyone what it finds out:

- It names a process that dies immediately, because the kernel closes its connection.
- It names a process that is silent for ``timeout_s``: the process or its host is stopped. A shorter
  call that holds Python's lock raises no alarm.
- It names a process whose main thread keeps others waiting in a collective for ``timeout_s``. The
  others report when their collectives give up; the one that does not report is the cause.
- Others may wait here for a process (:meth:`Watch.on_rank_0`, :meth:`Watch.gather`). It may take
  any time while it moves (pulse.py), and is named after ``timeout_s`` without a move.

The first such finding is the verdict on the run. If the main thread does not end within
``GRACE_S``, it is in a call that cannot be interrupted. The watching thread then prints the verdict
and ends the process. A main thread that loops while no collective waits for it is not detected.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from ... import errors
from ...errors import LostRankError, MoeyardError, Stopped
from . import verdicts
from .last_word import say_last
from .link import Message
from .lost_rank import is_lost_rank, last_line
from .peers import BEAT_S, Peer, Peers
from .pulse import pulse

LOOK_EVERY_S = 0.2
"""A waiting main thread checks this often whether the rank it waits for moves."""
WINDOW_S = 3.0
"""Collectives of several ranks give up within this time of each other."""
GRACE_S = 6.0
"""Seconds from a verdict until the process is ended; longer than ``WINDOW_S`` plus a beat."""

Answer = TypeVar("Answer")


class Stop(Protocol):
    """Says whether the run was asked to stop."""

    signal_name: str | None


class Watch:
    """One rank's view of the others: all of them on rank 0, rank 0 elsewhere."""

    def __init__(self, rank: int, world_size: int, token: str, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._me = f"rank {rank} on {socket.gethostname()}"
        self._peers = Peers(rank, world_size, token, self)
        self._changed: threading.Condition = self._peers.changed
        self._turn = 0
        """Counts calls that all ranks make together; the same on all of them."""
        self._outcomes: dict[int, Message] = {}
        """The outcomes of rank 0's turns."""
        self._verdict: str | None = None
        self._judged = 0.0
        self._waited: dict[int, float] = {}
        """When each rank's collective gave up."""

    def listen(self, host: str) -> int:
        """See :meth:`Peers.listen`."""
        return self._peers.listen(host)

    def connect(self, host: str, port: int) -> None:
        """See :meth:`Peers.connect`."""
        self._peers.connect(host, port, self.timeout_s)

    def wait_for_all(self, stop: Stop | None = None) -> None:
        """Wait until every rank has joined; raise :class:`LostRankError` that names the missing."""
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            while not self._peers.are_complete:
                self.check()
                if stop is not None and stop.signal_name is not None:
                    raise Stopped(f"stopped by {stop.signal_name} while ranks start.")
                if self.rank == 0 and time.monotonic() > deadline:
                    absent = set(range(1, self.world_size)) - self._peers.by_rank.keys()
                    self._decide(verdicts.missing(sorted(absent), self.timeout_s))
                self._changed.wait(LOOK_EVERY_S)

    def where(self, rank: int) -> str:
        """Return a rank's description; call on rank 0."""
        return self._me if rank == self.rank else self._peers.by_rank[rank].where

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON value on rank 0, in rank order; elsewhere nothing."""
        turn = self._next_turn()
        if self.rank != 0:
            self._peers.send({"kind": "value", "turn": turn, "value": value})
            return []
        values = [value]
        for rank in range(1, self.world_size):
            peer = self._peers.by_rank[rank]
            self._wait_for(peer, partial(peer.has_value, turn))
            values.append(peer.values.pop(turn))
        return values

    def on_rank_0(self, action: Callable[[], Answer]) -> Answer:
        """Run ``action`` on rank 0; the others wait for as long as rank 0 makes progress.

        Every rank returns the action's result, which must be a JSON value. A
        :class:`MoeyardError` of rank 0 is raised on every rank.
        """
        turn = self._next_turn()
        if self.rank != 0:
            self._wait_for(self._peers.by_rank[0], lambda: turn in self._outcomes)
            answer: Answer = _answer_in(self._outcomes.pop(turn))
            return answer
        outcome = {"kind": "outcome", "turn": turn}
        try:
            answer = action()
        except MoeyardError as error:
            self._peers.send({**outcome, "error": type(error).__name__, "message": str(error)})
            raise
        self._peers.send({**outcome, "value": answer})
        return answer

    def explain(self, error: BaseException) -> LostRankError | None:
        """Return the error that names the guilty rank, waiting for a verdict; None for our own."""
        if not is_lost_rank(error):
            return None
        with self._changed:
            self._waited.setdefault(self.rank, time.monotonic())
            if self.rank != 0:
                self._peers.send({"kind": "waited"})
            until = time.monotonic() + WINDOW_S + 2 * BEAT_S
            while self._verdict is None and time.monotonic() < until:
                self._changed.wait(LOOK_EVERY_S)
            if self._verdict is not None:
                return LostRankError(self._verdict)
        if isinstance(error, LostRankError):
            return error
        return LostRankError(
            f"{self._me} lost its connection to another rank ({last_line(error)}); see the logs of "
            "the others and start again."
        )

    def leave(self) -> None:
        """Leave after the last work; from then on this rank is not watched.

        Rank 0 leaves last, because it hosts the store; the others wait for it.
        """
        if self.rank != 0:
            self._peers.send({"kind": "bye"})
        for peer in self._peers.by_rank.values():
            self._wait_for(peer, peer.is_gone)
        if self.rank == 0:
            self._peers.send({"kind": "bye"})
        self._peers.flush()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends, unless there is a verdict already."""
        if self._verdict is None:
            is_sentence = isinstance(error, MoeyardError | OSError)
            reason = str(error) if is_sentence else f"{type(error).__name__}; see its log."
            self._tell(f"{self._me} ended with an error: {reason}")
        self._peers.flush()

    def close(self) -> None:
        """End the thread and close the connections."""
        self._peers.close()

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _wait_for(self, peer: Peer, is_there: Callable[[], bool]) -> None:
        started = time.monotonic()
        with self._changed:
            while not is_there():
                self.check()
                if time.monotonic() - max(peer.moved, started) > self.timeout_s:
                    self._decide(verdicts.held_up(peer, self.timeout_s, self.rank))
                if self.rank == 0:
                    pulse.note()  # rank 0 has a separate limit for each rank
                self._changed.wait(LOOK_EVERY_S)

    def check(self) -> None:
        """Raise :class:`LostRankError` if there is a verdict on the run."""
        if self._verdict is not None:
            raise LostRankError(self._verdict)

    def _decide(self, sentence: str) -> None:
        """Take the first finding as the verdict, and tell the others."""
        if self._verdict is None:
            self._verdict, self._judged = sentence, time.monotonic()
            self._tell(sentence)

    def _tell(self, sentence: str) -> None:
        self._peers.send({"kind": "verdict", "sentence": sentence})

    # Calls from the thread of the peers

    def heard(self, peer: Peer, message: Message) -> None:
        """See a message of a peer."""
        match message["kind"]:
            case "value":
                peer.values[message["turn"]] = message["value"]
            case "outcome":
                self._outcomes[message["turn"]] = message
            case "waited":
                self._waited.setdefault(peer.rank, time.monotonic())
            case "verdict":
                self._decide(message["sentence"])

    def ended(self, peer: Peer) -> None:
        """See that a peer's process has ended without saying goodbye."""
        self._decide(verdicts.ended(peer, self.rank))

    def beat(self) -> None:
        """Report this rank's progress to the peers, and judge them."""
        message = {"kind": "beat", "moves": pulse.moves(), "doing": pulse.doing}
        now = time.monotonic()
        for peer in self._peers.by_rank.values():
            if not peer.link.has_unsent:
                peer.link.send(message)
            if now - peer.heard > self.timeout_s and peer.link.is_open and not peer.has_left:
                self._decide(verdicts.held_up(peer, self.timeout_s, self.rank))
        if self.rank == 0 and self._waited and now - min(self._waited.values()) > WINDOW_S:
            self._decide(self._late())

    def after_round(self) -> None:
        """End the process if it still runs ``GRACE_S`` after the verdict."""
        if self._verdict is not None and time.monotonic() - self._judged > GRACE_S:
            say_last(self._verdict)
            os._exit(1)

    def _late(self) -> str:
        ranks = [rank for rank in range(self.world_size) if rank not in self._waited]
        peers = [self._peers.by_rank[rank] for rank in ranks if rank != 0]
        if len(ranks) == len(peers) == 1:
            return verdicts.held_up(peers[0], self.timeout_s, self.rank)
        doing = peers[0].doing if peers else pulse.doing
        return verdicts.late(list(map(self.where, ranks)), doing, self.timeout_s, self.rank)


def _answer_in(outcome: Message) -> Any:
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return outcome["value"]
