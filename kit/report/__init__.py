"""Outputs of a run: HTML report, LaTeX, bundle, and the comparison with published runs."""
