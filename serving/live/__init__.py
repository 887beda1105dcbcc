"""Follow a run that publishes: its updates replace weights while requests run."""
