"""Which points are asked about, and the step that follows from their values."""
