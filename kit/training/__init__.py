"""Phase 2 and Open-RS: supervised fine-tuning, GRPO and expert iteration."""
