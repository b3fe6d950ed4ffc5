"""Diagnosis: what an objective tells before anything is tuned."""
