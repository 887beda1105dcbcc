"""What ``data`` sections share whose rows are tokens of texts."""

from ..section import Section


class TokensConfig(Section):
    """Texts and what turns them into tokens."""

    format: str
    """What the texts are; a subclass says which there are."""
    tokenizer: str = "bytes"
    """``bytes``, a folder with a Hugging Face tokenizer, or a name on the hub. With ``start_from``,
    leave it out or null to use that folder's."""
