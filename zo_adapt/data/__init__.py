"""Data: sources, batches of their rows, and the order in which these are drawn."""
