"""Without network the Hub's libraries retry for a minute before they look into their cache; here they look at once."""

from __future__ import annotations

import functools
import logging
import os
import socket
from urllib.parse import urlsplit

log = logging.getLogger(__name__)
TIMEOUT_S = 5.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@functools.cache
def prefer_cache_without_network() -> None:
    """Set the Hub's offline mode for this process if its host cannot be reached; the user's own setting stands."""
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError as error:
        from huggingface_hub import constants

        log.warning("%s cannot be reached (%s): looking in the local cache only", endpoint.hostname, error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True  # read from the environment when the library was imported
