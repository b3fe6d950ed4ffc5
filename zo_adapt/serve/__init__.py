"""Models that run elsewhere: adapters are tuned here, forwards are made there."""
