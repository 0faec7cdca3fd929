"""Sessions: append-only token logs, how new messages are spliced on, who holds them and for how long."""
