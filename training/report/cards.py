"""The run in a dozen cards: a value and a note each."""

import statistics
from html import escape

from .charts import short
from .read import Run
from .words import data_of, model_of


def facts(run: Run) -> str:
    """Return the cards as an HTML list."""
    cards: list[tuple[str, str, str]] = [("Training loss", short(run.last["loss"]), "last record")]
    if held_out := run.series.get("eval_loss"):
        cards.append(("Held-out loss", short(held_out[-1][1]), f"step {held_out[-1][0]:,.0f}"))
    if accuracies := run.series.get("eval_accuracy"):
        step, share = accuracies[-1]
        cards.append(("Held-out accuracy", f"{share:.1%}", f"step {step:,.0f}"))
    if "tokens" in run.last:
        name = model_of(run).row_names.capitalize()
        cards.append((name, short(run.last["tokens"]), "trained on so far"))
    if speeds := run.series.get("tokens_per_s"):
        median = statistics.median(y for _, y in speeds)
        rate = f"{short(median)} {model_of(run).row_names}/s"
        cards.append(("Speed", rate, "median of the logged steps"))
    if seconds := _seconds(run):
        cards.append(("Time", _duration(seconds), "in the steps shown here"))
    if run.starts:
        cards += _start_cards(run)
    cards += _model_cards(run)
    cards.append(("Last checkpoint", run.last_checkpoint or "none yet", ""))
    return '<dl class="facts">' + "".join(map(_card, cards)) + "</dl>"


def _card(card: tuple[str, str, str]) -> str:
    name, value, note = map(escape, card)
    small = f"<small>{note}</small>" if note else ""
    return f"<div><dt>{name}</dt><dd>{value}{small}</dd></div>"


def _start_cards(run: Run) -> list[tuple[str, str, str]]:
    start, count = run.starts[-1], len(run.starts)
    ranks, ep = start.get("ranks", 1), start.get("ep", 1)
    active = f"{short(start.get('active_parameters', 0))} active per {model_of(run).row_name}"
    time = str(start.get("time", "")).replace("T", " ")
    return [
        ("Ranks", f"{ranks}, EP {ep}", f"{start.get('device')}, {start.get('precision')}"),
        ("Parameters", short(start.get("parameters", 0)), active),
        ("Last start", f"{time:.16} UTC", f"starts so far: {count}"),
        ("moeyard", str(start.get("moeyard")), f"torch {start.get('torch')}"),
    ]


def _model_cards(run: Run) -> list[tuple[str, str, str]]:
    config = run.config
    model, train = config.get("model", {}), config.get("train", {})
    heads = f"{model.get('num_heads')} heads"
    shape = f"{model.get('num_layers')} layers, width {model.get('d_model')}"
    cards = [("Model", shape, heads)]
    if moe := model.get("moe"):
        router = moe.get("router", {})
        experts = f"{moe.get('num_experts')} experts, k = {router.get('k')}"
        note = f"{router.get('kind')} router, expert width {moe.get('d_expert')}"
        cards.append(("MoE", experts, note))
    batch = data_of(run).batch_is.format(
        batch=train.get("batch_sequences"), length=train.get("sequence_length")
    )
    cards.append(("Batch", batch, f"lr {config.get('optimizer', {}).get('lr')}"))
    return cards


def _seconds(run: Run) -> float:
    total, before = 0.0, 0
    for step, phases in run.phases:
        total += (step - before) * sum(phases.values())
        before = step
    return total


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
