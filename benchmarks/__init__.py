"""Benchmarks of anymask: correctness beside speed, rivals beside ours. Start: `python -m benchmarks.run --quick`."""
