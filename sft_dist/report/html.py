"""What the HTML pages of a report have in common: one file each, everything inside, nothing else allowed in."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from typing import TYPE_CHECKING, Any

from sft_dist import __version__
from sft_dist.files import utc_now
from sft_dist.report.text import clip, clock, percent, plain, visible

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_CHARACTERS = 4000  # of one text in a page


def render_page(template: str, view: dict[str, Any]) -> str:
    """The page as HTML; `view` with the style, the script, a policy that lets only these in, version and time."""
    from markupsafe import Markup

    style, script = (_resource(name) for name in ("report.css", "report.js"))
    frame = {
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'",
        "version": __version__,
        "written": clock(utc_now()),
    }
    return str(_environment().get_template(template).render({**frame, **view}))


@functools.cache
def _environment() -> Environment:
    """Kept with its compiled templates: compiling takes longer than rendering."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sft_dist", "resources/html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every value passes here before it is escaped, so no place in the template can forget it.
        finalize=_shown,
    )
    environment.filters.update(percent=percent, plain=plain, clip=lambda text: clip(text, MAX_CHARACTERS))
    return environment


def _shown(value: Any) -> Any:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else visible(str(value))


def _resource(name: str) -> str:
    return (resources.files("sft_dist") / "resources" / "html" / name).read_text(encoding="utf-8").strip()


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
