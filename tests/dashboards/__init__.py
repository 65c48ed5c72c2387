"""Dashboards, rules and compose file; the service as a process and a run by hand for them."""
