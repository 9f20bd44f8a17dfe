"""Compiles programs for absent machines, and reports what limits them."""
