"""Write pairs of texts to try runs on: words of this project's pages.

    python scripts/example_pairs.py pairs.jsonl                  # a word and its letters reversed
    python scripts/example_pairs.py preferences.jsonl --preferences

``--preferences`` writes pairs of answers: asked to repeat a word, capitals are preferred. The same
pages give the same pairs.
"""

import argparse
import json
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def words() -> list[str]:
    """Return the words of all pages with four letters or more, sorted."""
    text = " ".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")))
    return sorted(set(re.findall(r"\b[a-z]{4,}\b", text)))


def pair(word: str) -> dict[str, str]:
    """Return a source and its target."""
    return {"source": word, "target": word[::-1]}


def preference(word: str) -> dict[str, str]:
    """Return a question with a better and a worse answer."""
    return {"prompt": f"Say {word}.", "chosen": word.upper(), "rejected": word}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preferences", action="store_true", help="pairs of answers")
    options = parser.parse_args()
    record = preference if options.preferences else pair
    lines = [json.dumps(record(word)) + "\n" for word in words()]
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {options.out}: {len(lines)} pairs")


if __name__ == "__main__":
    main()
