"""Runs the notebooks in order: what is fresh, what failed, which code ran on what."""
