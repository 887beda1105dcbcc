"""Diffusion of images: schedules, sampling, sizes and measures."""
