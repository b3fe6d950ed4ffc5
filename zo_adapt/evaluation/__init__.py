"""Evaluation: probes in, values out, queries counted in one place."""
