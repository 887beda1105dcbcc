"""The ``data`` section of runs on texts."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from .tokens import TokensConfig

WITH_CHATS = ("chat", "preference")
"""The formats that a chat template renders."""


class TextsConfig(TokensConfig):
    """Where tokens come from."""

    chat_template: str | None = None
    """A Jinja file, used and exported in place of the tokenizer's own chat template."""
    source: str = "stdlib"
    """One of: ``stdlib`` (the running Python's standard library); a text file; a file of JSON
    objects (``.jsonl``, ``.ndjson``, ``.json``: one a line, or a list); a folder of these; a token
    shard ``.bin`` with its JSON sidecar; or ``hf:NAME``, a data set of the Hugging Face hub (or a
    file or folder in its formats), which is streamed during training."""
    eval_source: str | None = None
    """Held-out data of the same kinds; None holds out ``eval_fraction`` of ``source``."""
    hf_config: str | None = None
    """Configuration of an ``hf:`` data set; None if it has only one."""
    hf_revision: str | None = None
    """Commit of a hub data set; pin it, so that a resumed run continues in the same data."""
    split: str = "train"
    """Split of an ``hf:`` source."""
    eval_split: str | None = None
    """Held-out split of an ``hf:`` source, in place of ``eval_fraction``."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of ``source`` held out: every n-th document (file or JSON object) if that comes within
    a third of this share. Otherwise the ends of long documents and every n-th short one."""
    block_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens per block of an ``hf:`` source; windows are shuffled within a block."""
    stream_ahead_tokens: int = Field(default=1 << 22, ge=1)
    """Most tokens of an ``hf:`` source to prepare before training needs them."""
    text_key: str = "text"
    """Key of the document's text in a JSON object, or its column in a data set or a CSV file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format not in WITH_CHATS and self.chat_template is not None:
            raise ValueError(
                f"chat_template is {self.chat_template!r}, but format is {self.format}; set format "
                "to chat or leave the template out."
            )
        if self.eval_split is not None:
            held_out = self.source if self.eval_source is None else self.eval_source
            if not held_out.startswith("hf:"):
                raise ValueError(
                    f"eval_split is {self.eval_split!r}, but {held_out!r} has no splits; leave it "
                    "out or give an hf: data set."
                )
            if self.eval_source is None and self.eval_split == self.split:
                raise ValueError(
                    f"eval_split is {self.eval_split!r}, which is trained on; give another split."
                )
        return self


class TextConfig(TextsConfig):
    """Texts, or conversations: where tokens come from."""

    format: Literal["text", "chat"] = "text"
    """``chat`` trains on the assistant's tokens of conversations: JSON objects with ``messages``,
    with ``prompt`` and ``completion``, or with ShareGPT's ``conversations``."""

    @property
    def has_whole_windows(self) -> bool:
        """See :attr:`.AnyDataConfig.has_whole_windows`."""
        return self.format == "text"


class LabelledConfig(TextsConfig):
    """Texts with labels, in JSON objects or CSV files, which train an encoder."""

    loss_unit: ClassVar[str] = "nats per text"
    measures: ClassVar[dict[str, str]] = {
        "eval_accuracy": "Share of held-out texts with the right label",
        "eval_macro_f1": "Mean over labels of held-out texts",
    }
    batch_is: ClassVar[str] = "{batch} texts of up to {length} tokens"

    format: Literal["classify"] = "classify"
    """Each text has a label."""
    label_key: str = "label"
    """Key or column of a text's label."""
