"""What may change, how it is selected, and how it is shifted without a trace."""
