"""The curves of runs on preference pairs."""

from .charts import Line, line_chart
from .read import Run

SIDES = (("training", "train"), ("held out", "eval"))


def pair_charts(run: Run, marks: list[int]) -> list[str]:
    """Return the charts of what pairs measure; ``marks`` are the steps of resumed starts."""
    series = run.series
    shares = [
        Line(name, series[key], color)
        for color, (name, side) in enumerate(SIDES)
        if (key := f"{side}_accuracy") in series
    ]
    rewards = [
        Line(f"{measure.replace('_reward', '')}, {name}", series[key], color)
        for color, (measure, name, side) in enumerate(
            (measure, name, side)
            for measure in ("chosen_reward", "rejected_reward", "margin")
            for name, side in SIDES
        )
        if (key := f"{side}_{measure}") in series
    ]
    return [
        line_chart("Pairs with the chosen answer ahead", "share", shares, floor=0.0, marks=marks),
        line_chart("Rewards and their margin", "beta x nats gained", rewards, marks=marks),
    ]
