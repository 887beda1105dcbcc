"""A layer's experts: what the layer asks of them, and where they are."""
