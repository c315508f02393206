"""One page with many rows as the model sees them, the worst first: self-contained, and safe whatever the rows hold."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources

# What ends up inside of a script element must not end it.
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


# How a token is shown, and its text.
Token = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """One row: its tokens as (kind, text), and the numbers by which it is found.

    Kinds: t trained, m masked, b a boundary (special token), B one that is trained, c beyond max_length, u unknown. And
    what is no token of the row: p padding, d where a document begins, x the weight of the trained tokens that follow.
    """

    number: int
    where: str
    tokens: Sequence[Token]
    length: int
    """Tokens within max_length."""
    trained: int
    cut: int
    """Tokens beyond it."""
    unknown: int
    padding: int = 0
    """Tokens that fill it up to the longest row of its micro batch."""
    documents: int = 1

    @property
    def share(self) -> float:
        """Of the tokens, those that are trained."""
        return self.trained / max(1, self.length)

    @property
    def badness(self) -> float:
        """What is lost, unknown, or not trained at all, as a sum of shares: the row to look at first has the most."""
        whole = max(1, self.length + self.cut)
        return self.cut / whole + self.unknown / whole + (self.trained == 0) + 0.1 * (1 - self.share)


def samples_page(samples: Sequence[Sample], title: str, notes: Sequence[str] = ()) -> str:
    """The page as HTML, `notes` below its title; nothing in it is fetched, and no text of a row is markup."""
    import jinja2

    rows = [{**asdict(one), "share": round(one.share, 4), "badness": round(one.badness, 4)} for one in samples]
    data = json.dumps(rows, ensure_ascii=False)
    for sign, spelled in ESCAPED.items():
        data = data.replace(sign, spelled)
    data = data.encode("utf-8", "backslashreplace").decode()
    style, script = _resource("preview.css"), _resource("preview.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_resource("preview.html.j2"))
    from markupsafe import Markup

    page: str = template.render(
        title=title,
        notes=notes,
        padded=any(one.padding for one in samples),
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page + "\n"


def _resource(name: str) -> str:
    return (resources.files("sft_dist") / "resources" / "html" / name).read_text(encoding="utf-8").strip()


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
