"""An incident as files that somebody else can open: one page without scripts, and the records.

`gather` asks the service's parts, `window` reads the records once, `page` draws, `pack` makes the
archive.
"""

from foreshock.api.incident.gather import gather
from foreshock.api.incident.pack import pack

__all__ = ["gather", "pack"]
