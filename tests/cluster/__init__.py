"""Tests that need a real, replicated ClickHouse."""
