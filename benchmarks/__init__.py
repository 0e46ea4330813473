"""Speed against peers, measured honestly: `python -m benchmarks`."""
