"""Several points evaluated in one forward."""
