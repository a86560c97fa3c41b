"""KV cache, eviction policies and the decode loop: prompts in, generations out."""
