"""Dynamic Memory Sparsification: training and measuring learned KV-cache eviction."""
