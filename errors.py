"""The errors a user can meet.

    MoeyardError
    +-- ConfigError       a key, value or combination in a configuration, or a call's argument
    +-- DataError         a text file, token shard or tokenizer that cannot be used
    +-- ModelFileError    a model folder that is missing something, damaged or of an unknown kind
    +-- ExpertReadError   an expert's bytes could not be read while serving
    +-- CheckpointError   a training checkpoint that cannot be written or read
    +-- TrainingError     training cannot go on (a loss that is not finite)
    |   +-- LostRankError     another rank has ended, is silent or keeps this one waiting
    +-- Stopped           a signal ended work that was under way; not a failure
    +-- RequestError      an HTTP request that cannot be served

Every message is one sentence with the field, the value and the remedy. Commands print the message
without a traceback; anything that is not a MoeyardError is our bug and keeps its traceback.
"""

from collections.abc import Iterable


class MoeyardError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(MoeyardError, ValueError):
    """A configuration key, value or combination that cannot work."""


class DataError(MoeyardError, ValueError):
    """A text file, token shard or tokenizer that cannot be used."""


class ModelFileError(MoeyardError, ValueError):
    """A model folder that is incomplete, damaged or of an unknown kind."""


class ExpertReadError(MoeyardError, OSError):
    """The bytes of some of a layer's ``experts`` could not be read.

    ``rows`` are the rows of the batch that chose one of them.
    """

    def __init__(self, message: str, experts: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.experts = tuple(experts)
        self.rows: tuple[int, ...] = ()


class CheckpointError(MoeyardError):
    """A training checkpoint that cannot be written or read."""


class TrainingError(MoeyardError):
    """Training cannot go on."""


class LostRankError(TrainingError):
    """Another rank has ended, is silent or keeps this one waiting for too long."""


class Stopped(MoeyardError):  # noqa: N818 - a request that was met, not an error
    """Work ended early because SIGTERM or Ctrl-C asked for it."""


class RequestError(MoeyardError, ValueError):
    """A request that cannot be served, with what OpenAI's error object needs.

    ``status`` is the HTTP status, ``param`` the offending field, ``code`` OpenAI's code string,
    ``retry_after_s`` the whole seconds after which asking again makes sense.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s
