"""Keys of ``config.json`` that folders of encoders share."""

from ....errors import ModelFileError
from ...config.encoder import MOST_LABELS, EncoderConfig
from .keys import Values


def read_labels(values: Values) -> tuple[str, ...]:
    """Return the labels in the order of ``id2label``.

    Without it they are transformers' names of ``num_labels`` labels, two if that is missing, too.
    """
    names = values.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(_num_labels(values)))
    if not isinstance(names, dict) or len(names) > MOST_LABELS:
        raise ModelFileError(
            f"config.json has id2label = {str(names)[:80]!r}; give an object with a name for each "
            f"label, at most {MOST_LABELS} of them."
        )
    missing = next((str(i) for i in range(len(names)) if str(i) not in names), None)
    if missing is not None:
        raise ModelFileError(
            f"config.json has an id2label with {len(names)} labels, but none for {missing}; number "
            "them from 0 upwards."
        )
    return tuple(str(names[str(index)]) for index in range(len(names)))


def _num_labels(values: Values) -> int:
    count = values.get("num_labels", 2)
    if type(count) is not int or not 2 <= count <= MOST_LABELS:
        raise ModelFileError(
            f"config.json has num_labels = {count!r}; use a whole number from 2 to {MOST_LABELS}."
        )
    return count


def write_encoder(config: EncoderConfig) -> Values:
    """Return the keys of any encoder."""
    labels: Values = {}
    if config.labels:
        labels = {
            "id2label": {str(index): label for index, label in enumerate(config.labels)},
            "label2id": {label: index for index, label in enumerate(config.labels)},
        }
    return labels | {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
    }
