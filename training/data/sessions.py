"""The sessions of a run: read from a log once, by rank 0, into the run folder."""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError, DataError
from ...moe.items import shape
from ...moe.items.table import FILE, ItemTable, open_table
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.sessions import SessionsConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .documents import Files
from .origins import are_made_from, origin_of
from .session_log import read_log
from .session_order import SessionOrder, read_sessions, write_sessions
from .session_pairs import SessionPairs, open_pairs
from .session_rows import LoggedSessions, find_sessions

SESSIONS = "sessions.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsData(Data):
    """Sessions to generate, and the items they are made of."""

    train: SessionOrder
    held_out: SessionOrder
    table: ItemTable
    all_sessions: LoggedSessions
    """Bad ones too, for reward models."""
    pairs: SessionPairs | None
    """None without ``data.alignment``, and with its weight 0."""


def build_sessions_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> SessionsData:
    """Read the log on rank 0 and open the sessions on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for a
    log that cannot be trained on, such as one with items that have no semantic id, or without
    sessions after enough history.
    """
    section = config.data
    assert isinstance(section, SessionsConfig), "who chose this data?"
    table = open_table(Path(section.items), "data.items")
    _check(config, section, table)
    mesh.on_rank_0(lambda: _prepare(section, table, folder, stop or StopRequest()))
    sessions = read_sessions(folder / SESSIONS)
    train = config.train
    sizes = shape.SessionShape(section.session_items, train.sequence_length // table.num_levels)
    options = (table, train.sequence_length, train.batch_sequences, config.seed)
    learnt = SessionOrder(sessions.select(sessions.is_learnt_C), *options)
    held_out = SessionOrder(sessions.select(sessions.is_held_out_C), *options)
    if mesh.rank == 0:
        for event, part in (("sessions_train", learnt), ("sessions_held_out", held_out)):
            facts = " ".join(f"{name}={value}" for name, value in asdict(part.facts).items())
            sys.stderr.write(f"event={event} {facts} items={len(table)}\n")
    pairs = open_pairs(section.alignment, learnt)
    return SessionsData(
        tokenizer=None,
        train=learnt,
        identity=_identity(learnt, section, pairs),
        num_train_tokens=learnt.facts.tokens,
        held_out_identity=held_out.identity,
        chat_template=None,
        files={FILE: table.text(), shape.FILE: sizes.text()},
        held_out=held_out,
        table=table,
        all_sessions=sessions,
        pairs=pairs,
    )


def _identity(learnt: SessionOrder, section: SessionsConfig, pairs: SessionPairs | None) -> str:
    """Return a hash of what a run learns: the sessions, and the pairs with how they count."""
    if pairs is None or section.alignment is None:
        return learnt.identity
    digest = hashlib.sha256(learnt.identity.encode())
    digest.update(section.alignment.model_dump_json(exclude={"pairs"}).encode())
    for tensor in pairs:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check(config: RunConfig, section: SessionsConfig, table: ItemTable) -> None:
    """Refuse sizes that do not fit the items."""
    if config.train.sequence_length < table.num_levels:
        raise ConfigError(
            f"train.sequence_length is {config.train.sequence_length}, but an item has "
            f"{table.num_levels} codes; raise it to these, times the items of a history."
        )
    if section.session_items > len(table):
        raise ConfigError(
            f"data.session_items is {section.session_items}, but {section.items} has {len(table)} "
            "items; lower it."
        )


def _prepare(section: SessionsConfig, table: ItemTable, folder: Path, stop: StopRequest) -> None:
    """Write the sessions unless they are there and were made from the same."""
    make_folder(folder)
    source, path = Path(section.source), folder / SESSIONS
    keys = section.model_dump(exclude={"items", "recall_at", "beams", "alignment"})
    log_print = Files([source], section.source, "", "data.source").fingerprint()
    facts = [log_print, hashlib.sha256(table.text().encode()).hexdigest(), keys]
    origin = origin_of(facts)
    if are_made_from([path], origin, [log_print]):
        return
    with LongWork("reading the log", stop) as work:
        log = read_log(source, "data.source", table.number, work.advance)
    sessions = find_sessions(log, section)
    for is_wanted_C, name in (
        (sessions.is_learnt_C, "train on"),
        (sessions.is_held_out_C, "hold out: no user has two"),
    ):
        if not is_wanted_C.any():
            raise DataError(
                f"data.source is {section.source!r}, which has no session to {name}; a session "
                f"needs {section.session_items} items, {section.session_watch_s:g} s of watch "
                f"time, a like and {section.min_history} items of history, so give a longer log or "
                "ask for less in the data section."
            )
    write_sessions(path, sessions, origin)
