"""Applications of NTMs: each imports the building, which imports none of them."""
