"""How many replicas a deployment should have, by what its engines have to do.

Ray counts HTTP requests. A request may ask for many answers, and one that is refused is counted
hardly at all. So replicas report the answers that hold a place, running or waiting, and there
should be one replica for each full batch of them.
"""

import math
import warnings
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from ..serve_args import ServeArgs

ANSWERS = "answers"
"""The metric of ``MoeyardServer.record_autoscaling_stats``."""
REPORT_EVERY_S = 2.0
LOOK_BACK_S = 6.0
"""Seconds that the metric is averaged over."""
UPSCALE_DELAY_S = 4.0
"""Seconds that more replicas must have been wanted. A replica takes longer than that to start."""


def replicas_for_answers(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return how many replicas to aim at; Ray applies the bounds and the delays.

    Ray runs this in its controller, as a copy, so it uses nothing else of this package.
    """
    reports = (context.aggregated_metrics or {}).get("answers", {})
    if not reports:  # none has been heard of yet
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(reports.values()) / context.config.target_ongoing_requests)), {}


def scaling(args: ServeArgs) -> AutoscalingConfig:
    """Return Ray's configuration for ``num_replicas`` to ``max_replicas``."""
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        return AutoscalingConfig(
            min_replicas=args.num_replicas,
            max_replicas=args.most_replicas,
            target_ongoing_requests=args.max_num_seqs,
            metrics_interval_s=REPORT_EVERY_S,  # deprecated, but what Ray 2.60 goes by
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=UPSCALE_DELAY_S,
            downscale_delay_s=args.downscale_delay,
            policy=AutoscalingPolicy(policy_function=f"{__name__}:replicas_for_answers"),
        )
