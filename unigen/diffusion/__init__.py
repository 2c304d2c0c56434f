"""Diffusion and flow matching: paths, solvers, denoisers, and the loop that joins them."""
