"""Put model, engine and HTTP application together from a server's arguments."""

import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp

from ..errors import ModelFileError
from .completions import Completions
from .engine import Engine
from .engine_thread import EngineThread
from .http_app import create_app
from .loading import open_model


class ServeArgs(BaseModel):
    """Arguments of ``moeyard serve``, of ``serve run`` and of a deployment's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A Hugging Face model folder."""
    served_model_name: str | None = None
    """Name clients use; None = the folder's name."""
    expert_memory: str | None = None
    """Bound on the experts kept in memory (2GiB, 25%); None keeps all."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """None = as stored."""
    max_num_seqs: int = Field(default=8, ge=1)
    """Requests in the batch; more wait."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and answer together; None = what the model takes."""
    prefill_chunk: int = Field(default=256, ge=1)
    """Prompt tokens read per step."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads; None = all cores."""
    api_key: str | None = Field(default=None, min_length=1)
    """Key clients must send; None asks for none."""

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model).resolve().name


class Server:
    """A running model: engine thread and HTTP application."""

    def __init__(self, args: ServeArgs) -> None:
        torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
        model, self._store = open_model(args.model, args.dtype, expert_memory=args.expert_memory)
        tokenizer = open_serving_tokenizer(Path(args.model))
        engine = Engine(
            model,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            self._store,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            prefill_chunk=args.prefill_chunk,
        )
        vocabulary = model.config.vocabulary
        self.thread = EngineThread(engine, vocabulary)
        completions = Completions(
            self.thread,
            lambda text: list(tokenizer(text, verbose=False)["input_ids"]),
            args.model_name,
            vocabulary,
        )
        self.app: ASGIApp = create_app(completions, args.api_key)

    def close(self) -> None:
        """Stop the threads."""
        self.thread.stop()
        if self._store is not None:
            self._store.close()


def open_serving_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """Open the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelFileError(
            f"{folder} has no usable tokenizer ({reason}); add tokenizer.json."
        ) from None
