"""Directions as numbers: a generator, its distributions, and what adds them to tensors."""
