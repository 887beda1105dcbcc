"""A click log whose truth is known: users with tastes, items with contents, sessions with clicks.

    python benchmarks/click_log.py OUT [--users 2000] [--items 600] [--seed 0]

Writes ``log.csv``, ``log.parquet`` (with pyarrow), ``embeddings.npz`` and ``world.json``. The same
arguments write the same files. ``World.read(OUT)`` then knows what users think of any session.

A user likes an item by its contents and its quality, and gets bored of items of one category within
a session. A feed shows items by the user's taste and a mood, a category that lasts for some
sessions. The feed knows neither quality nor boredom: a model that imitates its good sessions leaves
room for better ones.

U users, N items, C categories, D width of contents, I items of a session.
"""

import argparse
import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WIDTH = 16
"""Of contents and tastes."""
FAVOURITES = 3
"""Categories that a user likes."""
FEED = 2.5
"""How strongly the feed follows tastes; 0 shows anything."""
MOOD = 2.0
"""What an item of the mood's category has in addition in the feed."""
MOOD_STAYS = 0.6
"""Chance that the next session has the same mood."""
BOREDOM = 0.8
"""What an item loses for each earlier one of its category in the session."""
LENGTHS = (3, 11)
"""Least items of a session, and most, which is left out."""
SECONDS = 20.0
"""The watch time of an item that is watched whole."""


@dataclass(frozen=True)
class World:
    """Users and items by the sizes and the seed."""

    users: int = 2000
    items: int = 600
    categories: int = 12
    sessions: int = 8
    """Of each user in the log."""
    seed: int = 0

    @classmethod
    def read(cls, folder: Path) -> "World":
        """Return the world of a folder that :meth:`write` wrote."""
        return cls(**json.loads((folder / "world.json").read_text()))

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        centres_CD = _unit(draw.normal(size=(self.categories, WIDTH)))
        categories_N = np.arange(self.items) % self.categories
        noise_ND = draw.normal(size=(self.items, WIDTH)) * 0.8 / np.sqrt(WIDTH)
        contents_ND = _unit(centres_CD[categories_N] + noise_ND)
        quality_N = draw.normal(size=self.items) * 0.6
        chosen = [draw.permutation(self.categories)[:FAVOURITES] for _ in range(self.users)]
        favourites_UF = np.array(chosen)
        shares_UF = draw.dirichlet(np.full(FAVOURITES, 2.0), size=self.users)
        taste_UD = (shares_UF[..., None] * centres_CD[favourites_UF]).sum(axis=1)
        taste_UD = _unit(taste_UD + draw.normal(size=(self.users, WIDTH)) * 0.05)
        for name, value in (
            ("categories_N", categories_N),
            ("contents_ND", contents_ND),
            ("quality_N", quality_N),
            ("favourites_UF", favourites_UF),
            ("taste_UD", taste_UD),
        ):
            object.__setattr__(self, name, value)

    def wishes(self, user: int, items_I: npt.NDArray[np.int64]) -> Floats:
        """Return how much a user wants each item of a session, boredom included."""
        wish_I = 3 * (self.contents_ND[items_I] @ self.taste_UD[user]) + self.quality_N[items_I]
        own_I = self.categories_N[items_I]
        before_I = np.array([(own_I[:place] == own_I[place]).sum() for place in range(len(own_I))])
        return wish_I - BOREDOM * before_I

    def reward(self, user: int, items_I: npt.NDArray[np.int64]) -> float:
        """Return the share of a session that a user would watch, plus the share it would like."""
        wish_I = self.wishes(user, items_I)
        return float(_sigmoid(wish_I - 1).mean() + _sigmoid(2 * (wish_I - 2.5)).mean())

    def events(self) -> list[tuple[str, str, str, float, int]]:
        """Return the log: user, session, item, seconds watched, liked."""
        found = []
        for user in range(self.users):
            draw = np.random.default_rng([self.seed, 1, user])
            mood = int(draw.choice(self.favourites_UF[user]))
            shown_N = np.zeros(self.items, dtype=bool)
            for session in range(self.sessions):
                if draw.random() > MOOD_STAYS:
                    mood = int(draw.choice(self.favourites_UF[user]))
                feed_N = FEED * 2 * (self.contents_ND @ self.taste_UD[user])
                feed_N = feed_N + MOOD * (self.categories_N == mood) + draw.gumbel(size=self.items)
                items_I = np.argsort(-feed_N + 1e9 * shown_N)[: draw.integers(*LENGTHS)]
                shown_N[items_I] = True
                wish_I = self.wishes(user, items_I) + draw.normal(size=len(items_I)) * 0.3
                seconds_I = SECONDS * _sigmoid(wish_I - 1)
                liked_I = draw.random(len(items_I)) < _sigmoid(2 * (wish_I - 2.5))
                rows = zip(items_I.tolist(), seconds_I.tolist(), liked_I.tolist(), strict=True)
                for item, seconds, liked in rows:
                    found.append((f"u{user}", str(session), item_name(item), seconds, int(liked)))
        return found

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [item_name(item) for item in range(self.items)]
        contents = self.contents_ND.astype(np.float32)
        np.savez(folder / "embeddings.npz", ids=np.array(names), embeddings=contents)
        columns = ("user", "session", "item", "watch_s", "liked")
        events = [(*event[:3], round(event[3], 2), event[4]) for event in self.events()]
        with (folder / "log.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *events])
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            print("log.parquet is left out: pyarrow is not installed")
        else:
            values = dict(zip(columns, map(list, zip(*events, strict=True)), strict=True))
            parquet.write_table(pyarrow.table(values), folder / "log.parquet")
        (folder / "world.json").write_text(json.dumps(asdict(self)) + "\n")


def item_name(item: int) -> str:
    """Return the name of an item in the log."""
    return f"i{item}"


def _unit(x_ND: Floats) -> Floats:
    return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True)


def _sigmoid(x_I: Floats) -> Floats:
    return 1 / (1 + np.exp(-x_I))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--users", type=int, default=World.users)
    parser.add_argument("--items", type=int, default=World.items)
    parser.add_argument("--sessions", type=int, default=World.sessions, help="of each user")
    parser.add_argument("--seed", type=int, default=World.seed)
    found = parser.parse_args()
    world = World(found.users, found.items, sessions=found.sessions, seed=found.seed)
    world.write(found.folder)
    print(f"{found.folder}: {world.users} users, {world.items} items")


if __name__ == "__main__":
    main()
