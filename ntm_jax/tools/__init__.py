"""What one runs beside training: each imports the building, which imports none of them."""
