"""BERT (Devlin et al. 2019): a dense encoder, with or without a head for labels."""

from ...config.encoder import EncoderConfig
from ..expert_layouts import SeparateExperts
from .encoder_keys import read_labels, write_encoder
from .family import Family
from .keys import Values, check_only

CLASSIFIER = "BertForSequenceClassification"
_DEFAULTS: Values = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_ONLY: Values = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_NAMES = (
    ("embed_tokens", "embeddings.word_embeddings"),
    ("embed_positions", "embeddings.position_embeddings"),
    ("embed_types", "embeddings.token_type_embeddings"),
    ("embed_norm", "embeddings.LayerNorm"),
    ("layers.", "encoder.layer."),
    ("self_attn.q_proj", "attention.self.query"),
    ("self_attn.k_proj", "attention.self.key"),
    ("self_attn.v_proj", "attention.self.value"),
    ("self_attn.o_proj", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("mlp.up_proj", "intermediate.dense"),
    ("mlp.down_proj", "output.dense"),
    ("output_norm", "output.LayerNorm"),
    ("pooler.", "pooler.dense."),
)
"""Our names of parts, and BERT's."""


def _read(values: Values) -> EncoderConfig:
    check_only(values, _ONLY)
    if values.get("problem_type") is not None:
        check_only(values, {"problem_type": "single_label_classification"})
    has_head = CLASSIFIER in (values.get("architectures") or ())
    return EncoderConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        d_ff=values["intermediate_size"],
        max_positions=values["max_position_embeddings"],
        num_types=values["type_vocab_size"],
        norm_eps=values["layer_norm_eps"],
        labels=read_labels(values) if has_head else (),
    )


def _write(config: EncoderConfig) -> Values:
    return {
        "architectures": [CLASSIFIER if config.labels else "BertModel"],
        "intermediate_size": config.d_ff,
        "hidden_act": "gelu",
        "type_vocab_size": config.num_types,
        "layer_norm_eps": config.norm_eps,
    }


def _other_names(parameter: str) -> tuple[str, ...]:
    """Return the names in folders of the encoder alone, and in those of BERT's first release."""
    for ours, theirs in _NAMES:
        parameter = parameter.replace(ours, theirs)
    old = parameter.replace("LayerNorm.weight", "LayerNorm.gamma")
    old = old.replace("LayerNorm.bias", "LayerNorm.beta")
    return parameter, f"bert.{old}", old


BERT = Family(
    model_type="bert",
    architecture=CLASSIFIER,
    read=_read,
    write=_write,
    experts=SeparateExperts(),
    defaults=_DEFAULTS,
    renames=_NAMES,
    prefix="bert.",
    activation="gelu",
    has_experts=False,
    kinds=("encoder",),
    write_common=write_encoder,
    other_names=_other_names,
)
