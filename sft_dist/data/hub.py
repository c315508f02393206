"""Without an answer the Hub's libraries retry for minutes before they look into their cache; here they look at once."""

from __future__ import annotations

import functools
import http.client
import logging
import os
import urllib.error
import urllib.request

log = logging.getLogger(__name__)
TIMEOUT_S = 5.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
# What stands before a server answers so when the server itself does not.
NOT_THERE = (502, 503, 504)


@functools.cache
def prefer_cache_without_network() -> None:
    """Set the Hub's offline mode for this process if its host gives no answer; the user's own setting stands."""
    if "HF_HUB_OFFLINE" in os.environ or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    why = _unanswered(endpoint)
    if why is not None:
        log.warning("%s cannot be reached (%s): looking in the local cache only", endpoint, why)
        work_from_cache()


def work_from_cache() -> None:
    """From here on this process, and those that it starts, ask the Hub for nothing; the user's own setting stands.

    For when all that a run needs is here: the Hub may go away while it trains.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # read from the environment when the library was imported


def _unanswered(endpoint: str) -> str | None:
    """Why nothing comes from `endpoint`, in words; None if something answers, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}" if error.code in NOT_THERE else None
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None
