"""Directions as numbers: a generator, two distributions, and what adds them to tensors."""
