"""Watching a run from inside the libraries that drive it: one module per library.

Nothing is imported here; each module imports its own library and says so if it is missing.
"""
