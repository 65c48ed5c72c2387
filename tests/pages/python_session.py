"""Runs pieces of Python in one namespace, as a notebook would: one JSON line each, in and out."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Until the end of the input."""
    # What the pieces print goes to the log; answers keep the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names: dict[str, Any] = {"__name__": "__main__"}
    for line in sys.stdin:
        given = json.loads(line)
        os.environ.update(given["environment"])
        os.chdir(given["folder"])
        try:
            exec(compile(given["code"], given["name"], "exec"), names)
            failure = None
        except BaseException:  # noqa: BLE001 whatever it is, the page has it wrong
            failure = traceback.format_exc()
        answers.write(json.dumps({"failure": failure}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
