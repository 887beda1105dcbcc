"""Write the tables of docs/performance.md from the results of ``expert_mlp.py``.

    python benchmarks/performance_table.py

Everything between a table's two marks is replaced.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PEER_PREFIXES = ("F.grouped_mm", "transformers", "DeepSpeed")
GPU_PEERS = ("torch", "transformers grouped_mm", "ScatterMoE", "MegaBlocks")
NOT_MEASURED = "not measured yet"


def cpu_rows(cells: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the CPU table: head, then a line for each size."""
    yield ["layer", "type", "T", "rows an expert", "mode", "ms", "of the floor", "best peer"]
    for cell in cells:
        found = cell["contestants"]
        own_s = found["moeyard (auto)"]["seconds"]
        peers = {n: f["seconds"] for n, f in found.items() if n.startswith(PEER_PREFIXES)}
        best = min(peers, key=peers.__getitem__)
        yield [
            cell["layer"],
            cell["type"],
            str(cell["tokens"]),
            f"{cell['rows_per_expert']:.3g}",
            cell["mode"],
            f"{own_s * 1e3:.2f}",
            f"{found['floor']['seconds'] / own_s:.2f}x",
            f"{peers[best] / own_s:.2f}x of {best}",
        ]


def decode_rows(cells: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the table of few tokens: bytes of weights a second, and few bits against 16 or 32."""
    yield [
        "layer",
        "type",
        "T",
        "memory GB/s",
        "plain, of memory",
        "int8",
        "int4",
        "without a compiler",
    ]
    for cell in cells:
        if cell["memory_bytes_per_s"] is None:
            continue
        found, memory = cell["contestants"], cell["memory_bytes_per_s"]
        own = found["moeyard (auto)"]
        yield [
            cell["layer"],
            cell["type"],
            str(cell["tokens"]),
            f"{memory / 1e9:.0f}",
            f"{own['weights_bytes_per_s'] / memory:.2f}",
            *(
                f"{own['seconds'] / found[f'moeyard {n}']['seconds']:.2f}x"
                for n in ("int8", "int4")
            ),
            f"{own['seconds'] / found['moeyard (torch)']['seconds']:.2f}x, int8 "
            f"{own['seconds'] / found['moeyard int8 (torch)']['seconds']:.2f}x",
        ]


def gpu_rows(cells: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the GPU table: our kernels against dense products and the fastest other way."""
    yield ["layer", "T", "mode", "ms", "TFLOP/s", "of dense", "others", "peak MiB"]
    for cell in cells:
        found = {n: c for n, c in cell["contestants"].items() if "seconds" in c}
        ours = found.get("triton, graph", found["triton"])["seconds"]
        others = {name: found[name]["seconds"] for name in GPU_PEERS if name in found}
        ratio = ""
        if others:
            best = min(others, key=lambda name: others[name])
            # Peers are not captured in a graph, so the ratio uses our time without a graph.
            ratio = f"{others[best] / found['triton']['seconds']:.2f}x of {best}"
        dense = found.get("dense", {}).get("seconds")
        yield [
            cell["layer"],
            str(cell["tokens"]),
            cell["mode"] + (", graph" if "triton, graph" in found else ""),
            f"{ours * 1e3:.2f}",
            f"{cell['flops'] / ours / 1e12:.0f}",
            f"{dense / ours:.2f}" if dense and cell["tokens"] > 256 else "",
            ratio,
            f"{found['triton']['peak_bytes'] / 2**20:.0f}",
        ]


def table(rows: Iterator[list[str]]) -> str:
    """Return rows as Markdown."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with what stands between the marks of ``name`` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    """Write the tables for which there are results."""
    page = PAGE.read_text()
    for name, result, rows in (
        ("decode on a CPU", "expert_mlp_cpu", decode_rows),
        ("all sizes on a CPU", "expert_mlp_cpu", cpu_rows),
        ("GPU", "expert_mlp_cuda", gpu_rows),
    ):
        path = RESULTS / f"{result}.json"
        text = NOT_MEASURED
        if path.exists():
            text = table(rows(json.loads(path.read_text())["cells"]))
        page = replaced(page, name, text)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
