"""Programs other than training: each imports the building, which imports none of them."""
