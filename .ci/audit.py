"""Known vulnerabilities of the pinned packages, from pip-audit's service, as far as it answers.

A vulnerability fails the check. A service that is not reached, or knows nothing of a package, does
not: then it says that this part was not done, and never that it passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"
SECONDS = 300


def verdict(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """What a report of pip-audit says.

    Args:
        report: Its JSON: packages with `vulns`, or with the `skip_reason` why they were not asked.

    Returns:
        Exit code, lines for people.
    """
    asked = [package for package in report["dependencies"] if "vulns" in package]
    skipped = [package["name"] for package in report["dependencies"] if "vulns" not in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no version'}"
        for package in asked
        for found in package["vulns"]
    ]
    vulnerable = bool(lines)
    lines.append(f"pip-audit: {len(asked)} packages looked up, {len(lines)} known vulnerabilities")
    if not asked and not skipped:
        lines.append(not_done("the report names no package"))
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        lines.append(not_done(f"the service had nothing on {len(skipped)} packages ({shown})"))
    return int(vulnerable), lines


def not_done(reason: str) -> str:
    """A line that nobody takes for a pass."""
    return f"pip-audit: NOT DONE: {reason}"


def main() -> int:
    """Ask, and say what came of it."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(PINS), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        code, lines = verdict(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        code, lines = 0, [not_done(f"the service did not answer within {SECONDS} s")]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        code, lines = 0, [not_done(last[:300])]
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
