"""Does transformers compute the same as we do with a model we export?

    python benchmarks/export_parity.py MODEL_DIR

Opens an export as Qwen3MoeForCausalLM and as ours, in float32: the largest difference of logits
over a batch of text, and 64 greedy tokens after each of several prompts.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

import moeyard

from report import write_results

PROMPTS = ["import os\n", "def main(", "class Node:\n    def __init__(self", "for i in range("]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    theirs, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, Qwen3MoeForCausalLM)
    ours, tokenizer = moeyard.load(folder), AutoTokenizer.from_pretrained(folder)
    text = Path(torch.__file__).read_text(encoding="utf-8")[:2048]
    ids_BT = torch.tensor(tokenizer(text)["input_ids"][:2048]).view(4, 512)
    difference = float((ours(ids_BT) - theirs(ids_BT).logits).abs().max())
    print(f"missing, unexpected keys: {loading['missing_keys']}, {loading['unexpected_keys']}")
    print(f"largest difference of logits over 4 x 512 tokens: {difference:.1e}")
    equal = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = theirs.generate(ids, max_new_tokens=64, do_sample=False)
        found = ours.generate(ids, max_new_tokens=64, temperature=0)
        equal += torch.equal(found, expected)
        print(f"{prompt!r} -> {tokenizer.decode(found[0, ids.shape[1] :].tolist())!r}")
    print(f"64 greedy tokens equal for {equal} of {len(PROMPTS)} prompts")
    path = write_results(
        "export_parity",
        {
            "question": "do transformers' Qwen3MoeForCausalLM and ours agree on an exported model",
            "largest_difference_of_logits": difference,
            "greedy_answers_equal": [equal, len(PROMPTS)],
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
