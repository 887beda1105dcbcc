"""TRL's loss on a file of conversations; run by chat_loss.py with the python that has TRL.

PYTHON_WITH_TRL benchmarks/trl_loss.py MODEL_DIR CHAT.jsonl
"""

import json
import sys
import tempfile

import torch
import transformers
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Print loss, number of targets and versions as JSON."""
    folder, path = sys.argv[1:]
    data = load_dataset("json", data_files=path, split="train").select_columns(["messages"])
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=SFTConfig(
                output_dir=out,
                assistant_only_loss=True,
                max_length=None,
                per_device_eval_batch_size=len(data),
                per_device_train_batch_size=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=data,
            eval_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        batch = next(iter(trainer.get_eval_dataloader()))
        targets = int((batch["labels"][:, 1:] != -100).sum())
        loss = trainer.evaluate()["eval_loss"]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print(json.dumps({"loss": loss, "targets": targets, **versions, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
