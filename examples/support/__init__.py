"""What the examples stand on: models and texts that are fetched once, tables and figures."""
