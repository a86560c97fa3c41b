"""Problem sets, prompts and near-duplicate detection: where questions come from."""
