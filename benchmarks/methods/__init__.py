"""Prefix tuning against the other ways to adapt a model: `python -m benchmarks.methods`."""
