"""Layers split over ranks: how rows pass from stage to stage."""
