"""The earlier place of projects.reward, kept for modules of users."""
