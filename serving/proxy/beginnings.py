"""Name the beginnings of a request's prompt, so that equal ones can go to one replica.

A replica may keep what it has computed for a prompt. It helps a later request as far as both begin
alike. The proxy hashes the first 128 characters, the first 256, and so on by doubling: the longest
hash that two requests share says how far they agree, within a factor of two. The model's name and
the salt are part of every hash, because replicas keep nothing across those.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

SHORTEST = 128
"""Characters of the shortest beginning that is worth a choice of replica."""
MOST = 12
"""Beginnings of one request: the longest has 256 Ki characters."""
HASH_BYTES = 8
MOST_KNOWN = 100_000
"""Beginnings remembered, of about 200 bytes each; the one not seen for longest is forgotten."""
FIELDS = ("messages", "prompt")


class LastSeen:
    """Which replica saw each beginning last."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._where: OrderedDict[str, str] = OrderedDict()

    def find(self, names: Sequence[str], among: Collection[str]) -> str | None:
        """Return the replica of the longest beginning that one of ``among`` has seen."""
        for name in reversed(names):
            replica = self._where.get(name)
            if replica in among:
                return replica
        return None

    def add(self, names: Sequence[str], replica: str) -> None:
        """Remember that ``replica`` has seen these beginnings."""
        for name in names:
            self._where[name] = replica
            self._where.move_to_end(name)
        while len(self._where) > self._most:
            self._where.popitem(last=False)


def name_beginnings(body: bytes) -> list[str]:
    """Return the hashes of a request's beginnings, shortest first.

    Empty for a prompt of less than :data:`SHORTEST` characters, and for what is no request: the
    replica will say so.
    """
    try:
        values = json.loads(body)
        if not isinstance(values, dict):
            return []
        text = next((_text_of(values[name]) for name in FIELDS if values.get(name)), "")
        whose = json.dumps([values.get("model"), values.get("cache_salt")])
    except (ValueError, RecursionError):  # one may nest deeper than can be written, but not read
        return []
    running = hashlib.blake2b(whose.encode(), digest_size=HASH_BYTES)
    names: list[str] = []
    done, end = 0, SHORTEST
    while end <= len(text) and len(names) < MOST:
        running.update(text[done:end].encode(errors="surrogatepass"))
        names.append(running.hexdigest())
        done, end = end, 2 * end
    return names


def _text_of(prompt: Any) -> str:
    """Return a prompt, which may be text, ids or messages, as text that begins as it does."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
