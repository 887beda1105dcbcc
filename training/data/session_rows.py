"""Sessions of a log with the history before each, and those to learn from.

C sessions, I items of a session, P items that users liked or watched.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..formats.sessions import SessionsConfig
from .session_log import SessionLog

Numbers = npt.NDArray[np.int64]


class LoggedSessions(NamedTuple):
    """All sessions of a log that are long enough, in its order."""

    history_P: Numbers
    """The histories of all users, one after another: places of items in the table."""
    starts_C: Numbers
    """Where the user's history begins."""
    ends_C: Numbers
    """Where the history before the session ends."""
    users_C: Numbers
    items_CI: Numbers
    """The first items of the session."""
    watch_s_CI: npt.NDArray[np.float64]
    """Seconds that each was watched."""
    liked_CI: npt.NDArray[np.bool_]
    is_good_C: npt.NDArray[np.bool_]
    """Whether a run learns to generate it: with a like, and watched for long enough."""
    is_held_out_C: npt.NDArray[np.bool_]
    """The last good one of each user who has two."""

    def select(self, chosen: npt.NDArray[np.bool_]) -> "LoggedSessions":
        """Return some of the sessions; histories stay where they are."""
        fields = self._asdict()
        kept = {name: fields[name][chosen] for name in self._fields if name != "history_P"}
        return self._replace(**kept)

    @property
    def is_learnt_C(self) -> npt.NDArray[np.bool_]:
        """Whether a run trains on a session."""
        return self.is_good_C & ~self.is_held_out_C

    @property
    def is_before_held_out_C(self) -> npt.NDArray[np.bool_]:
        """Whether a session came before its user's held-out one, or there is none."""
        last = {int(self.users_C[one]): int(one) for one in np.flatnonzero(self.is_held_out_C)}
        ends = [last.get(user, len(self.users_C)) for user in self.users_C.tolist()]
        return np.arange(len(self.users_C)) < np.array(ends, dtype=np.int64)


def find_sessions(log: SessionLog, config: SessionsConfig) -> LoggedSessions:
    """Return the sessions of a log with ``session_items`` items after ``min_history`` others.

    A session's history has the items of earlier sessions of the same user.
    """
    length = config.session_items
    is_positive_E = log.liked_E | (log.watch_s_E >= config.positive_watch_s)
    history: list[int] = []
    rows: list[tuple[int, int, int]] = []
    kept: list[Numbers] = []
    for events_U in _groups(log.users_E):
        start = len(history)
        own_U = log.sessions_E[events_U]
        for session in dict.fromkeys(own_U.tolist()):
            events_S = events_U[own_U == session]
            end = len(history)
            if len(events_S) >= length and end - start >= config.min_history:
                rows.append((start, end, int(log.users_E[events_S[0]])))
                kept.append(events_S[:length])
            history += log.items_E[events_S[is_positive_E[events_S]]].tolist()
    starts_C, ends_C, users_C = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    events_CI = np.array(kept, dtype=np.int64).reshape(-1, length)
    watch_s_CI, liked_CI = log.watch_s_E[events_CI], log.liked_E[events_CI]
    is_good_C = liked_CI.any(axis=1) & (watch_s_CI.sum(axis=1) >= config.session_watch_s)
    return LoggedSessions(
        history_P=np.array(history, dtype=np.int64),
        starts_C=starts_C,
        ends_C=ends_C,
        users_C=users_C,
        items_CI=log.items_E[events_CI],
        watch_s_CI=watch_s_CI,
        liked_CI=liked_CI,
        is_good_C=is_good_C,
        is_held_out_C=_last_of_two(users_C, is_good_C),
    )


def _groups(values_E: Numbers) -> list[Numbers]:
    """Return the places of each value, in order, by value."""
    order_E = values_E.argsort(kind="stable")
    borders = np.flatnonzero(np.diff(values_E[order_E])) + 1
    return np.split(order_E, borders)


def _last_of_two(users_C: Numbers, is_good_C: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mark the last good session of each user who has two or more."""
    good = np.flatnonzero(is_good_C)
    last = {int(users_C[place]): place for place in good}
    counts = np.bincount(users_C[good], minlength=1)
    held_out = [place for user, place in last.items() if counts[user] >= 2]
    found = np.zeros(len(users_C), dtype=np.bool_)
    found[held_out] = True
    return found
