"""Scripts behind docs/benchmarks.md: each prints ratios measured in one run."""
