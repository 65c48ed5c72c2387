"""Logs of others become records: one reader per format, chosen by what the file holds.

Pure but for reading the files. Nothing is dropped in silence: the report names what was left out.
"""

from foreshock.api.cli.importers.detect import FORMATS, read_logs
from foreshock.api.cli.importers.names import parse_map
from foreshock.api.cli.importers.points import Imported, ImportedRun, ImportProblem, Report

__all__ = [
    "FORMATS",
    "ImportProblem",
    "Imported",
    "ImportedRun",
    "Report",
    "parse_map",
    "read_logs",
]
