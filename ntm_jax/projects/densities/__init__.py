"""Data of known density, flow maps, and the likelihood of an ODE."""
