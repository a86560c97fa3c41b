"""Not All Bits Are Equal: the ledger of bytes, the sweep over ways to spend them, the advisor."""
