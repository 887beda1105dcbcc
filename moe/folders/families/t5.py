"""T5 (Raffel et al. 2020) and Switch Transformer (Fedus et al. 2022): encoder-decoders.

T5 is dense, with relu (1.0) or a gated tanh-GELU (1.1) and perhaps a separate output layer.
Switch has experts of one choice in every n-th layer of each stack. transformers gives an expert
``expert_capacity`` rows of a sequence and drops the others; here none is dropped.
"""

from dataclasses import replace

from ....errors import ModelFileError
from ...config.encoder_decoder import DenseActivation, EncoderDecoderConfig
from ...config.model import LayersConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import Values, check_only
from .t5_names import StackNames, SwitchExperts

_ACTIVATIONS: dict[str, DenseActivation] = {"relu": "relu", "gated-gelu": "gated_gelu"}
_COMMON: Values = {
    "vocab_size": 32_128,
    "d_kv": 64,
    "d_ff": 2048,
    "num_decoder_layers": None,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "n_positions": 512,
}
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_T5_DEFAULTS = _COMMON | {
    "d_model": 512,
    "num_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": "relu",
}
_SWITCH_DEFAULTS = _COMMON | {
    "d_model": 768,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "num_experts": 8,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
    "router_bias": False,
}


def _read_common(values: Values) -> Values:
    check_only(values, {"is_encoder_decoder": True, "is_decoder": False})
    encoder, decoder = values["num_layers"], values["num_decoder_layers"]
    decoder = encoder if decoder is None else decoder
    start = values.get("decoder_start_token_id")
    is_tied = values["tie_word_embeddings"]
    return {
        "vocab_size": values["vocab_size"],
        "d_model": values["d_model"],
        "num_layers": encoder + decoder,
        "source_layers": encoder,
        "num_heads": values["num_heads"],
        "head_dim": values["d_kv"],
        "d_ff": values["d_ff"],
        "max_positions": values["n_positions"],
        "num_buckets": values["relative_attention_num_buckets"],
        "max_distance": values["relative_attention_max_distance"],
        "norm_eps": values["layer_norm_epsilon"],
        "tie_embeddings": is_tied,
        "scale_outputs": is_tied,
        "start_id": values["pad_token_id"] if start is None else start,
    }


def _write_common(config: EncoderDecoderConfig) -> Values:
    encoder = config.num_source_layers
    values: Values = {
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "d_model": config.d_model,
        "num_layers": encoder,
        "num_decoder_layers": config.num_layers - encoder,
        "num_heads": config.num_heads,
        "d_kv": config.head_width,
        "n_positions": config.max_positions,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.start_id is not None:
        values["decoder_start_token_id"] = config.start_id
    return values


def _read_t5(values: Values) -> EncoderDecoderConfig:
    activation = values["feed_forward_proj"]
    if activation not in _ACTIVATIONS:
        raise ModelFileError(
            f"config.json has feed_forward_proj = {activation!r}; the known ones are "
            f"{' and '.join(_ACTIVATIONS)}."
        )
    common = _read_common(values)
    scale = values.get("scale_decoder_outputs")  # transformers 5 writes it, older ones do not
    if scale is not None:
        common["scale_outputs"] = scale
    return EncoderDecoderConfig(**common, activation=_ACTIVATIONS[activation])


def _write_t5(config: EncoderDecoderConfig) -> Values:
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    return {
        "d_ff": config.d_ff,
        "feed_forward_proj": theirs[config.activation],
        "scale_decoder_outputs": config.scale_outputs,
    }


def _read_switch(values: Values) -> EncoderDecoderConfig:
    check_only(values, {"dense_act_fn": "relu"})
    common = _read_common(values)
    encoder = common["source_layers"]
    dense: list[int] = []
    for side, layers in (
        ("encoder", range(encoder)),
        ("decoder", range(encoder, common["num_layers"])),
    ):
        step = values.get(f"{side}_sparse_step")
        if step is None:
            step = _step(len(layers), values[f"num_sparse_{side}_layers"])
        dense += [one for one in layers if not _is_sparse(one - layers.start, step)]
    router = TopK(
        k=1,
        renormalize=False,
        logit_bias=values["router_bias"],
        balance_loss=values["router_aux_loss_coef"],
        z_loss=values["router_z_loss_coef"],
    )
    moe = MoEConfig(
        num_experts=values["num_experts"],
        d_expert=values["d_ff"],
        activation="relu",
        router=router,
    )
    return EncoderDecoderConfig(**common, dense_layers=tuple(dense), moe=moe)


def _write_switch(config: EncoderDecoderConfig) -> Values:
    assert config.moe is not None, "why_not was not asked"
    router = config.moe.router
    assert isinstance(router, TopK), "why_not was not asked"
    values: Values = {
        "d_ff": config.moe.d_expert,
        "dense_act_fn": "relu",
        "num_experts": config.moe.num_experts,
        "expert_capacity": config.max_positions,  # of a sequence: transformers then drops none
        "router_bias": router.logit_bias,
        "router_aux_loss_coef": router.balance_loss,
        "router_z_loss_coef": router.z_loss,
    }
    encoder = config.num_source_layers
    for side, layers in (
        ("encoder", range(encoder)),
        ("decoder", range(encoder, config.num_layers)),
    ):
        wanted = [config.is_moe(layer) for layer in layers]
        for count in range(len(layers) + 2):
            step = _step(len(layers), count)
            if wanted == [_is_sparse(layer, step) for layer in range(len(layers))]:
                values[f"num_sparse_{side}_layers"] = count
                values[f"{side}_sparse_step"] = step
                break
    return values


def _step(num_layers: int, num_sparse: int) -> int:
    """Return how transformers spreads a number of MoE layers: one of so many."""
    return num_layers // num_sparse if num_sparse > 0 else num_layers


def _is_sparse(layer: int, step: int) -> bool:
    return step == 1 or (step > 1 and layer % step == 1)


def _bind_t5(family: Family, config: LayersConfig) -> Family:
    assert isinstance(config, EncoderDecoderConfig), "the family has one kind"
    is_gated = config.activation == "gated_gelu"
    names = StackNames(config.num_source_layers, "DenseReluDense", is_gated)
    return replace(family, name_of=names.of)


def _bind_switch(family: Family, config: LayersConfig) -> Family:
    assert isinstance(config, EncoderDecoderConfig), "the family has one kind"
    names = StackNames(config.num_source_layers, "mlp", is_gated=False)
    return replace(family, name_of=names.of, experts=SwitchExperts(names))


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    read=_read_t5,
    write=_write_t5,
    experts=SeparateExperts(),
    defaults=_T5_DEFAULTS,
    may_be_null=("num_decoder_layers",),
    activation=None,
    has_experts=False,
    kinds=("encoder_decoder",),
    write_common=_write_common,
    other_names=lambda name: (),
    copies=_COPIES,
    bind=_bind_t5,
)

SWITCH_TRANSFORMERS = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    read=_read_switch,
    write=_write_switch,
    experts=SeparateExperts(),
    defaults=_SWITCH_DEFAULTS,
    may_be_null=("num_decoder_layers",),
    activation=None,
    kinds=("encoder_decoder",),
    write_common=_write_common,
    other_names=lambda name: (),
    copies=_COPIES,
    bind=_bind_switch,
)
