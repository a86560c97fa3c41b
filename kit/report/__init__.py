"""What a run hands out: HTML report, LaTeX, bundle, and the comparison with published runs."""
