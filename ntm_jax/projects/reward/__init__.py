"""Post-training on rewards and preferences, and collecting samples that a reward accepts."""
