"""What a model needs and how fast it can be, before it is opened."""
