"""The activations an expert may have."""

from typing import Literal

Activation = Literal["swiglu"]
