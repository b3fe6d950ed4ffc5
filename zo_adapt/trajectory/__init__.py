"""Trajectories: a whole fine-tune as the terms of its updates."""

from zo_adapt.trajectory.file import columns as columns
