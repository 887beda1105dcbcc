"""Routers in words, for ``moeyard routers`` and docs/routers.md."""

from ..without_memory import without_memory
from .router import RouterConfig, RouterSizes
from .table import ROUTERS, router

HEAD = ("name", "reads", "k", "learns", "state", "continues text", "paper")


def table() -> str:
    """Return one line for each router, with a head."""
    rows = [HEAD, *(_row(config()) for config in ROUTERS)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    hint = "moeyard routers NAME shows the options of one; model.moe.router: {kind: NAME} takes it."
    return "\n".join([*lines, "", hint, ""])


def describe(name: str) -> str:
    """Return a router's meaning and its fields with defaults."""
    config = type(router(name))
    return f"{name} ({config.__name__}, {config.paper})\n\n{config.__doc__}\n"


def _row(config: RouterConfig) -> tuple[str, ...]:
    sizes = RouterSizes(d_model=8, num_experts=8, vocab_size=8)
    with without_memory():
        module = config.build(sizes)
    buffers = [name for name, _ in module.named_buffers()]
    return (
        config.kind,
        _reads(config),
        "varies" if config.varies else "fixed",
        "yes" if config.learns else "no",
        ", ".join(buffers) or "-",
        "no" if config.why_not_causal() else "yes",
        config.paper,
    )


def _reads(config: RouterConfig) -> str:
    fields = type(config).model_fields
    if "router" in fields:
        return "as the inner router"
    return "any hidden rows" if "lookahead" in fields else str(config.reads_at())
