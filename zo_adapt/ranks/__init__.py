"""Several processes, on one machine or many, that share the evaluations of a step."""
