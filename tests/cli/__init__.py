"""Tests of the command line's own parts; commands are tested beside what they drive."""
