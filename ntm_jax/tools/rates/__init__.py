"""Measures how fast the programs are."""
