"""Datasets of the Hub. Without an answer its libraries retry for minutes before they look into their cache; here at once."""

from __future__ import annotations

import functools
import http.client
import logging
import os
import textwrap
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sft_dist.config.schema import SourcePart
from sft_dist.data.paths import nearby
from sft_dist.errors import DataError

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


def hub_dataset(part: SourcePart) -> Any:
    """The dataset of the Hub, from the local cache where there is no network. Raises DataError if it is not there."""
    prefer_cache_without_network()
    import datasets

    try:
        return datasets.load_dataset(part.path, part.name, split=part.split, revision=part.revision)
    except Exception as error:
        # datasets raises a dozen kinds here (no network, gated, unknown name, split or configuration, bad file).
        raise _not_fetched(part, str(part.path), error) from error


def _not_fetched(source: SourcePart, name: str, error: Exception) -> DataError:
    tried = f"load_dataset({name!r}, {source.name!r}, split={source.split!r}, revision={source.revision!r})"
    reason = textwrap.shorten(str(error), 300) or "no reason given"
    offline = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key, "0") not in ("", "0")]
    steps = [f"if {name} is a file: {nearby(Path(name))}"]
    if offline:
        steps.append(f"{offline[0]} is set, so only datasets in the local cache are found; unset it to fetch")
    steps.append("without a network here, fetch it once on a machine that has one (same HF_HOME), or pass a JSONL file")
    return DataError(
        f"{name} is no file in {Path.cwd()}, and the dataset of that name could not be fetched from here\n"
        f"  tried  {tried}\n  got    {type(error).__name__}: {reason}",
        hint="\n  ".join(steps),
    )
