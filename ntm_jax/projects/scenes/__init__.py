"""Drawn scenes with captions, and exact checks of what a sample shows."""
