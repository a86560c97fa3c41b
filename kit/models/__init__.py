"""Loads models and the embedder, quantizes weights, saves and resumes checkpoints."""
