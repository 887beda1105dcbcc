"""Put model, engine and HTTP application together from a server's arguments."""

import os
import re
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.types import ASGIApp

from ..errors import ModelFileError
from ..moe.model_folder import ModelFolder
from .completions import Completions
from .engine import Engine, check_length
from .engine_thread import EngineThread
from .http_app import create_app
from .loading import open_model, open_store, pick_dtype

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


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
    """Compute threads; None = all cores this process may use."""
    api_key: str | None = None
    """Key clients must send; None asks for none."""

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str | None) -> str | None:
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError("the key is empty or holds blanks; use printable ASCII.")
        return key

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model).resolve().name


def check_model(args: ServeArgs) -> None:
    """Refuse a folder, a tokenizer or a budget that cannot work; reads headers only."""
    folder = ModelFolder(Path(args.model))
    folder.check()
    dtype = pick_dtype(folder, args.dtype)
    open_serving_tokenizer(Path(args.model))
    if args.expert_memory is not None:
        open_store(folder, dtype, args.expert_memory).close()
    folder.close()
    check_length(args.max_model_len, folder.config.max_positions)


class Server:
    """A running model: engine thread and HTTP application."""

    def __init__(self, args: ServeArgs) -> None:
        torch.set_num_threads(args.num_threads or len(os.sched_getaffinity(0)))
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
        self.thread = EngineThread(engine)

        eos_text = str(tokenizer.eos_token)

        def encode(text: str) -> list[int]:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
            while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos_text):
                ids.pop()  # some tokenizers end every text; a prompt goes on
            return ids

        completions = Completions(self.thread, encode, args.model_name)
        self.app: ASGIApp = create_app(completions, args.api_key)

    def close(self) -> None:
        """Stop the threads."""
        self.thread.stop()
        if self._store is not None:
            self._store.close()


def open_serving_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """Open the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty tokenizer up from config.json
        raise ModelFileError(f"{folder} has no tokenizer; add tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer library raises whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"{folder} has no usable tokenizer ({reason}); add tokenizer.json."
        ) from None
