"""One run of benchmarks/offloading.py with accelerate: some layers in memory, the others on disk.

    PYTHONPATH=... python benchmarks/offloading_accelerate.py MODEL_DIR --layers-in-memory N

Needs ``pip install accelerate``. Prints one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers-in-memory", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu"}
    for layer in range(layers):
        is_in_memory = layer < arguments.layers_in_memory
        places[f"model.layers.{layer}"] = "cpu" if is_in_memory else "disk"
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as offload:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=arguments.dtype, device_map=places, offload_folder=offload
        )
        ids = torch.tensor([[84, 104, 101]])
        with torch.inference_mode():
            past = model(ids, use_cache=True).past_key_values
            started = time.perf_counter()
            for _ in range(arguments.tokens):
                past = model(ids[:, -1:], past_key_values=past, use_cache=True).past_key_values
            seconds = time.perf_counter() - started
    print(json.dumps({"tokens_per_s": arguments.tokens / seconds}))


if __name__ == "__main__":
    main()
