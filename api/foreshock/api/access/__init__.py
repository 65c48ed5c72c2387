"""Who may do what: tokens, page sessions, limits per token, and the audit log.

Decides and remembers; the door that asks (`guard.py`) and the routes are elsewhere.
"""
