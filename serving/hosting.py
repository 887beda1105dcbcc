"""What a Ray Serve replica hosts: a server for each kind of model."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from ..moe.routers.own_code import allow
from . import server
from .engine.admission import Admission
from .openers.series import SERIES_KINDS
from .openers.table import OPENERS, opener_of
from .series.args import check_series_model
from .series.server import SeriesServer
from .serve_args import ServeArgs


class Work(Protocol):
    """The thread that computes answers."""

    def problem(self) -> str | None:
        """Return why nothing is computed, or None."""
        ...

    def stop(self) -> None:
        """End after what is under way; what waits fails."""
        ...


class Counted(Protocol):
    """What a server counts."""

    registry: CollectorRegistry


class Hosted(Protocol):
    """A running model with its HTTP application."""

    admission: Admission

    @property
    def thread(self) -> Work:
        """What computes."""
        ...

    @property
    def metrics(self) -> Counted:
        """What it counts."""
        ...

    def app(self, render_metrics: Callable[[], Awaitable[bytes]] | None = None) -> ASGIApp:
        """Return the HTTP application; ``render_metrics`` makes what ``/metrics`` answers."""
        ...

    def end_files(self) -> None:
        """Write the ends of the files that it writes, when no request follows."""
        ...

    def close(self) -> None:
        """Stop the threads."""
        ...


class Host(NamedTuple):
    """How a kind of model is checked and opened."""

    check: Callable[[ServeArgs, bool], None]
    open: Callable[[ServeArgs, str], Hosted]


_TEXT = Host(server.check_model, server.Server)
_SERIES = Host(check_series_model, SeriesServer)
_HOSTS: dict[str, Host] = {"decoder": _TEXT, **dict.fromkeys(SERIES_KINDS, _SERIES)}
"""By the kind of model."""


def check_served(folder: ModelFolder) -> None:
    """Raise :class:`ConfigError` for a kind of model that there is no server for."""
    if folder.config.kind not in _HOSTS:
        raise ConfigError(
            f"{folder.path} has a model of kind {folder.config.kind}, which is not served; use "
            f"{OPENERS[opener_of(folder)].remedy} for it."
        )


def check_model(args: ServeArgs, runs_here: bool = False) -> None:
    """Refuse a model or a budget that cannot work; reads headers only.

    ``runs_here`` says that the replicas run on this machine, whose memory must hold the model.
    """
    _host_of(args).check(args, runs_here)


def open_server(args: ServeArgs, replica: str) -> Hosted:
    """Return the running server of a replica."""
    return _host_of(args).open(args, replica)


def _host_of(args: ServeArgs) -> Host:
    allow(args.allow_code)
    folder = ModelFolder(local_folder(args.model))
    folder.close()
    check_served(folder)
    return _HOSTS[folder.config.kind]
