"""What the watch calls the work of stages."""

WAITING = "the passing of rows between stages"
