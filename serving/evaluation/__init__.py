"""How good a model is: loss on a text, and lm-eval's tasks."""
