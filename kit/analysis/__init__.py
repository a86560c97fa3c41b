"""Statistics, published claims, verdicts, tables and plots, from records alone."""
