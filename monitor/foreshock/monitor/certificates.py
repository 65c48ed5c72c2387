"""How the certificate of a service is checked. Opens no connection."""

from __future__ import annotations

import os
import ssl

__all__ = ["verification"]


def verification() -> ssl.SSLContext | bool:
    """How a service's certificate is checked, for `httpx.Client(verify=...)`.

    `FORESHOCK_CA` names a PEM file with an authority of one's own, taken beside the system's;
    without it httpx's way, which reads `SSL_CERT_FILE`.

    Raises:
        ValueError: The file is not there, or holds no certificate.
    """
    path = os.environ.get("FORESHOCK_CA", "").strip()
    if not path:
        return True
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"FORESHOCK_CA is {path!r}: {error}; allowed: a PEM file") from None
    return context
