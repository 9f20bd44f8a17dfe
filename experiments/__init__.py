"""The experiments: default.py holds every setting, each other file what one experiment changes."""
