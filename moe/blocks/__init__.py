"""How the outputs of MoE layers join the residual stream, one file for each kind."""
