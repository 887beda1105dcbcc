"""Compute forecasts in a thread, and hand them to asyncio.

Series that are there together are computed together, those of several requests too, if they are
equally long and asked the same. A forecast does not depend on the others in its batch.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from ...errors import ConfigError, ExpertReadError, RequestError
from ...moe.models.forecaster import Forecaster, Question
from ...moe.models.series_values import Context, Forecast
from ..engine.step import request_error
from .metrics import SeriesMetrics

log = logging.getLogger(__name__)

STUCK_AFTER_S = 600.0
"""A batch that takes longer makes the server unhealthy. It is a whole forecast, not one step."""
RETRY_AFTER_S = 10


@dataclass(slots=True, eq=False)
class _Asked:
    """A request on its way."""

    question: Question
    contexts: Sequence[Context]
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[list[Forecast]]"
    arrived: float = field(default_factory=perf_counter)
    found: dict[int, Forecast] = field(default_factory=dict)
    """By the number of the series."""
    is_over: bool = False
    """Whether it is answered, has failed, or its client has left."""

    def key(self, number: int) -> tuple[object, ...]:
        """Return what series must share to be computed together."""
        question = self.question
        length = len(self.contexts[number])
        return length, question.horizon, question.quantiles, question.seed


class ForecastThread:
    """The thread of one forecaster, alive until ``stop``."""

    def __init__(self, forecaster: Forecaster, metrics: SeriesMetrics, batch_series: int) -> None:
        self.forecaster = forecaster
        self._metrics = metrics
        self._batch_series = batch_series
        self._new: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._waiting: deque[tuple[_Asked, int]] = deque()
        """Series that are not computed yet: the request, and the number of the series in it."""
        self._open: set[_Asked] = set()
        """Requests that have been taken in and not answered."""
        self._batch_started: float | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="forecasts", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Return why no forecast is computed, or None."""
        if self._failure is not None:
            return self._failure
        if not self._thread.is_alive():
            return "the thread of forecasts has stopped"
        started = self._batch_started
        duration_s = 0.0 if started is None else time.monotonic() - started
        if duration_s > STUCK_AFTER_S:
            return f"one forecast has taken {duration_s:.0f} s"
        return None

    async def forecast(self, contexts: Sequence[Context], question: Question) -> list[Forecast]:
        """Return the forecasts of contexts, which :meth:`Forecaster.context_of` made.

        Leaving early drops the series that are not computed yet. Raises :class:`RequestError`.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(question, contexts, loop, loop.create_future())
        self._new.put(asked)
        try:
            # Checked after queueing: a thread that ended before would never answer.
            problem = self.problem()
            if problem is not None:
                raise _unavailable(f"{problem}; try again later.")
            return await asked.answer
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            raise
        finally:
            asked.is_over = True

    def stop(self) -> None:
        """End the thread after the batch it is in."""
        self._new.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while self._take_new():
                batch = self._next_batch()
                if batch:
                    self._batch_started = time.monotonic()
                    self._compute(batch)
                    self._batch_started = None
                self._count_requests([])
            self._failure = "the server is shutting down"
        except BaseException as error:  # a native library's panic is not an Exception
            log.exception("forecasts failed")
            self._failure = f"forecasts failed ({type(error).__name__}); see the server's log"
        finally:
            # In any case, no client may wait for ever.
            self._fail_all(_unavailable(self._failure or "the thread of forecasts has stopped"))

    def _take_new(self) -> bool:
        """Take in what has come, waiting if there is nothing else to do; False: stop."""
        while True:
            try:
                asked = self._new.get(block=not self._waiting)
            except queue.Empty:
                return True
            if asked is None:
                return False
            self._open.add(asked)
            self._waiting.extend((asked, number) for number in range(len(asked.contexts)))

    def _next_batch(self) -> list[tuple[_Asked, int]]:
        """Take the series that has waited longest, and those that go with it."""
        batch: list[tuple[_Asked, int]] = []
        others: deque[tuple[_Asked, int]] = deque()
        while self._waiting and len(batch) < self._batch_series:
            asked, number = self._waiting.popleft()
            if asked.is_over:
                self._open.discard(asked)
                continue
            fits = not batch or asked.key(number) == batch[0][0].key(batch[0][1])
            (batch if fits else others).append((asked, number))
        self._waiting.extendleft(reversed(others))
        return batch

    def _compute(self, batch: list[tuple[_Asked, int]]) -> None:
        """Compute a batch and answer the requests that are complete with it.

        What fails for lack of memory, for an expert that cannot be read or for a forecast that is
        not finite, fails those requests alone that it concerns.
        """
        requests = list(dict.fromkeys(asked for asked, _ in batch))
        self._count_requests(requests)
        question = batch[0][0].question
        contexts = [asked.contexts[number] for asked, number in batch]
        forecasts = self._attempt(contexts, question)
        if isinstance(forecasts, RequestError):
            if len(requests) == 1:
                self._fail(requests[0], forecasts)
                return
            for one in requests:
                self._compute([part for part in batch if part[0] is one])
            return
        self._metrics.count_forecast(sum(map(len, contexts)), question.horizon, len(batch))
        for (asked, number), forecast in zip(batch, forecasts, strict=True):
            asked.found[number] = forecast
            if len(asked.found) == len(asked.contexts):
                self._metrics.count_end(asked.arrived)
                self._open.discard(asked)
                _hand_over(asked, [asked.found[place] for place in range(len(asked.contexts))])

    def _attempt(
        self, contexts: list[Context], question: Question
    ) -> list[Forecast] | RequestError:
        """Return forecasts, or why there are none; a bug is raised."""
        try:
            return self.forecaster.run(contexts, question)
        except ExpertReadError as error:
            return _unavailable(str(error))
        except ConfigError as error:
            return RequestError(str(error), param="series")
        except Exception as error:
            return request_error(error)

    def _fail(self, asked: _Asked, error: RequestError) -> None:
        self._open.discard(asked)
        if not asked.is_over:
            self._metrics.count_failure()
            _hand_over(asked, error)

    def _fail_all(self, error: RequestError) -> None:
        """End every request, also those that have not been taken in."""
        while not self._new.empty():
            asked = self._new.get()
            if asked is not None:
                self._open.add(asked)
        for asked in list(self._open):
            self._fail(asked, error)

    def _count_requests(self, running: Sequence[_Asked]) -> None:
        self._metrics.running.set(len(running))
        self._metrics.waiting.set(len(self._open.difference(running)))


def _hand_over(asked: _Asked, answer: list[Forecast] | RequestError) -> None:
    """Give an answer or an error to the event loop of the request."""

    def give() -> None:
        if asked.answer.done():
            return  # the client has left
        if isinstance(answer, RequestError):
            asked.answer.set_exception(answer)
        else:
            asked.answer.set_result(answer)

    asked.is_over = True
    if not asked.loop.is_closed():
        asked.loop.call_soon_threadsafe(give)


def _unavailable(message: str) -> RequestError:
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)
