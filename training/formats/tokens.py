"""What ``data`` sections share whose rows are tokens of texts."""

from .data_section import AnyDataConfig


class TokensConfig(AnyDataConfig):
    """Texts and what turns them into tokens."""

    tokenizer: str = "bytes"
    """``bytes``, a folder with a Hugging Face tokenizer, or a name on the hub. With ``start_from``,
    leave it out or null to use that folder's."""
