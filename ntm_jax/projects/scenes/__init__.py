"""Drawn scenes with captions, and exact checks of samples against their captions."""
