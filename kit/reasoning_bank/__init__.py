"""ReasoningBank: strategies extracted from solved problems, stored and retrieved."""
