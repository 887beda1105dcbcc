"""The leader's connection to one owner, which may be lost and come back.

n rows, K choices, r routed rows, D model width.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError, ExpertReadError
from ..experts.forwards import Forward
from .channel import Channel, LostPeerError
from .connecting import Address, connect
from .facts import Facts
from .frames import Head, Kind
from .hiring import Hiring
from .lobby import HANDSHAKE_S
from .owner_metrics import OneOwner

log = logging.getLogger(__name__)

START_S = 300.0
"""For an owner's first start, and for each of the next."""
ANSWER_S = 60.0
"""An owner that takes longer for one layer counts as lost."""
PATIENCE_S = 30.0
"""How long requests wait for another owner in the place of a lost one."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
"""Between two looks for a lost owner; each is twice as long as the one before."""


class OwnerLink:
    """Used by the engine's thread; a thread in the background looks for a lost owner."""

    def __init__(self, index: int, hiring: Hiring, secret: bytes, metrics: OneOwner) -> None:
        self.index = index
        self.metrics = metrics
        self.facts: Facts | None = None
        self._hiring, self._secret = hiring, secret
        self._channel: Channel | None = None
        self._number = 0
        self._changed = threading.Condition()
        self._lost_at = 0.0
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def open(self, own: Facts) -> None:
        """Wait until the owner is ready; raises :class:`ConfigError` if it does not fit."""
        try:
            self._connect(self._hiring.address(self.index, START_S), own)
        except LostPeerError as error:
            raise ConfigError(
                f"owner {self.index} of the experts did not start ({error}); its log has more."
            ) from None

    def begin(self, forward: Forward) -> None:
        """Tell the owner of a forward."""
        numbers = torch.tensor([forward.sequences, forward.phases, forward.lengths])
        self._tell(Head(Kind.BEGIN, rows=len(forward.sequences)), numbers)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Let the owner read experts that the layer will need."""
        self._tell(Head(Kind.PREFETCH, layer=layer, rows=len(experts)), torch.tensor(experts))

    def ask(self, layer: int, x_nD: Tensor, experts_nK: Tensor) -> int:
        """Send rows; return the number of the request. Raises :class:`LostPeerError`."""
        if self._channel is None:
            raise LostPeerError("it has ended")
        self._number += 1
        head = Head(Kind.COMPUTE, self._number, layer, *experts_nK.shape)
        self.metrics.sent.inc(self._channel.send(head, [x_nD, experts_nK]))
        return self._number

    def answer(self, number: int, asked_at: float) -> Tensor:
        """Return the lines of a request as bytes, valid until the next request.

        Raises :class:`LostPeerError`, and :class:`ExpertReadError` without its rows.
        """
        if self._channel is None:
            raise LostPeerError("it has ended")
        head, payload = self._channel.receive()
        if head.number != number:
            raise LostPeerError("it answered another request")
        if head.kind == Kind.FAILED:
            problem = json.loads(bytes(payload.numpy()).rstrip(b"\0"))
            raise ExpertReadError(problem["message"], problem["experts"])
        self.metrics.answer(head, head.payload, time.perf_counter() - asked_at)
        return payload

    def lose(self, error: LostPeerError) -> None:
        """Give the connection up, and begin to look for another owner in the background."""
        with self._changed:
            if self._channel is None or self._is_closed:
                return
            self._channel.close()
            self._channel, self._lost_at = None, time.monotonic()
        self.metrics.losses.inc()
        self.metrics.up.set(0)
        log.warning("owner %d of the experts is lost: %s", self.index, error)
        self._thread = threading.Thread(target=self._look, name="lost-owner", daemon=True)
        self._thread.start()

    def is_back(self) -> bool:
        """Wait for the owner, until :data:`PATIENCE_S` after its loss; say whether it is here."""
        with self._changed:
            left = self._lost_at + PATIENCE_S - time.monotonic()
            self._changed.wait_for(lambda: self._channel is not None, timeout=max(0.0, left))
            return self._channel is not None

    def close(self) -> None:
        """End the connection."""
        with self._changed:
            self._is_closed = True
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _tell(self, head: Head, numbers: Tensor) -> None:
        """Send what needs no answer, if the owner is here."""
        if self._channel is None:
            return
        try:
            self._channel.send(head, [numbers])
        except LostPeerError as error:
            self.lose(error)

    def _connect(self, address: Address, own: Facts) -> None:
        channel, told = connect(address, self._secret)
        try:
            facts = Facts.from_json(told)
            own.check_same(facts, self.index)
            channel.limit(ANSWER_S)
        except BaseException:
            channel.close()
            raise
        with self._changed:
            if self._is_closed:
                channel.close()
                return
            self.facts, self._own = facts, own
            self.metrics.start_again()
            self.metrics.up.set(1)
            self._channel = channel
            self._changed.notify_all()

    def _look(self) -> None:
        """Connect again: to the same process, or to the one that has taken its place."""
        pause_s = FIRST_PAUSE_S
        while not self._is_closed:
            started = math.inf
            try:
                address = self._hiring.address(self.index, START_S)
                started = time.monotonic()
                self._connect(address, self._own)
                return
            except (LostPeerError, ConfigError) as error:
                log.warning("owner %d of the experts is not back: %s", self.index, error)
            if time.monotonic() - started >= HANDSHAKE_S:  # it listens and does not answer
                self._hiring.replace(self.index)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
