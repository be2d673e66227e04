"""Renders a page as one HTML file with style, script and plotly.js. The template escapes all data.

Its content security policy names the two scripts by their hashes and allows nothing to be fetched: what data brings along is
never run, and no network is asked, whatever else goes wrong.
"""

import base64
import hashlib
import json
import re
from functools import cache
from importlib import resources

from ficpd import __version__
from ficpd.experiments.report.blocks import Page

SCRIPT_END = re.compile(r"<(?=/script|!--)", re.IGNORECASE)
"""Text that would end a script's element, or hide its end."""


def render(page: Page) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # every name in every template is escaped unless it is marked as ours
    environment = Environment(
        loader=PackageLoader("ficpd.experiments.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    scripts = [plotly(), own("page.js")]
    return environment.get_template("template.html.jinja").render(
        page=page, version=__version__, style=own("page.css"), scripts=scripts, policy=policy(scripts),
        plots={figure.id: json.loads(str(figure.plot.to_json(validate=False))) for figure in page.figures},
    )  # fmt: skip


def policy(scripts: list[str]) -> str:
    """Returns the page's `Content-Security-Policy`. Styles are inline because plotly.js writes its own."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"


def own(name: str) -> str:
    return (resources.files("ficpd.experiments.report") / name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """Returns plotly.js as plotly's package ships it (MIT; its notice is at its head)."""
    from plotly.offline import get_plotlyjs

    return SCRIPT_END.sub(r"\\x3C", get_plotlyjs())
