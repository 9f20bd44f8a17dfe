"""Samples weighted to a target density."""
