"""The command line: the one place that may know monitor, trainer and api."""
