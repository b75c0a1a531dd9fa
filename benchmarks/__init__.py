"""Benchmarks of a checkout: `python -m benchmarks.run --list` names the suites."""
