"""Writes the description of the service: `python -m docs.openapi` (or `make docs`)."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from foreshock.api.app import create_app
from foreshock.api.live_service import LiveService
from foreshock.api.settings import Settings

__all__ = ["TARGET", "document"]

TARGET: Final = Path(__file__).with_name("openapi.json")


def document() -> str:
    """The description as it is committed."""
    with TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder)), live=LiveService)
        return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
