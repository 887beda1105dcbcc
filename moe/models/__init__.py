"""Models made of MoE layers, their sampling and their low-rank updates."""
