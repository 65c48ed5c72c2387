"""The checks of `foreshock doctor`, one module per place that can be wrong; each only looks."""
