"""Small preference pairs, for tests of DPO."""

import json
from pathlib import Path
from typing import Any


def pair(number: int) -> dict[str, Any]:
    """Return a pair of one of the shapes; no two are alike, and lengths differ."""
    question = f"What is {number} + 1?"
    chosen, rejected = f"It is {number + 1}.", f"{'Perhaps ' * (number % 3)}{number}"
    if number % 2:
        return {"prompt": question, "chosen": chosen, "rejected": rejected}
    before = [{"role": "system", "content": "Be brief."}] if number % 4 else []
    prompt = [*before, {"role": "user", "content": question}]
    sides = {"chosen": chosen, "rejected": rejected}
    return {name: [*prompt, {"role": "assistant", "content": text}] for name, text in sides.items()}


def write(path: Path, count: int = 40) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(count)))
    return path
