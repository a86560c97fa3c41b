"""Runs a model over problems, grades the answers and stores one record per sample."""
