"""Loops: what drives an optimizer until a budget is used up."""
