"""Hierarchical parametric memory: feed-forward blocks that a question fetches."""
