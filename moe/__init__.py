"""Routers, experts, the MoE layer, losses, load statistics, the decoder and its folders."""
