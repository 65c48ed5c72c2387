"""Tests of foreshock.api."""
