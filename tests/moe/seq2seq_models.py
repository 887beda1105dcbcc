"""Small encoder-decoders of transformers, and ours with their weights."""

from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from moeyard.moe.batch import Batch
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.models.documents import batch_of_lengths
from moeyard.moe.models.encoder_decoder import EncoderDecoder

SOURCES, TARGETS = (5, 1, 17, 9, 30), (3, 8, 1, 12, 20)
SIZES = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 44,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
SWITCH = {
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 5,
}
CASES = {
    "t5": ("T5", {}),
    "t5_gated": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "switch": ("SwitchTransformers", SWITCH),
    "switch_bias": ("SwitchTransformers", SWITCH | {"router_bias": True, "num_layers": 2}),
}


def theirs(case: str) -> nn.Module:
    """Return transformers' model of a case, with random weights everywhere."""
    name, own = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SIZES | own)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if not own.get("tie_word_embeddings", True):
        model.lm_head.weight = nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.3)
        model.config.tie_word_embeddings = False  # transformers 5 ties T5 even if it should not
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(case: str, folder: Path) -> nn.Module:
    """Save a case's model as transformers does, and return it."""
    model = theirs(case)
    model.save_pretrained(folder)
    return model


def ours(folder: Path) -> EncoderDecoder:
    """Return our model of a folder, in training mode."""
    opened = ModelFolder(folder)
    opened.check()
    model = EncoderDecoder(opened.config)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            opened.read_into(name, parameter.data)
    for layer, moe in model.moe_layers():
        for expert in range(moe.num_experts):
            up, down = moe.experts.fc1.data[expert], moe.experts.fc2.data[expert]
            opened.read_expert(layer, expert, {"up": up, "down": down})
    return model


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Return random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 50, (length,), generator=generator) for length in lengths]


def ragged(rows: list[torch.Tensor]) -> Batch:
    """Return texts as a batch without padding."""
    return batch_of_lengths(torch.cat(rows), np.array([len(row) for row in rows]))


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask for transformers."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def their_logits(model: nn.Module, sources: list, targets: list) -> torch.Tensor:
    """Return transformers' scores of the targets' rows."""
    (ids, mask), (target_ids, target_mask) = padded(sources), padded(targets)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=target_ids,
        decoder_attention_mask=target_mask,
    )
    return output.logits[target_mask.bool()]
