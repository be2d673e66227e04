"""Renders a page as one HTML file with style, script and plotly.js. The template escapes all data.

Its content security policy allows only the two scripts, by their hashes, and no network access. So a script in the data
never runs, even if the escaping fails.
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
"""Matches text that would end a script element, or hide its end."""


def render(page: Page) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # every value in the template is escaped, unless the template marks it as safe
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
    """Returns the page's `Content-Security-Policy`. Styles are inline, because plotly.js writes inline styles."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"


def own(name: str) -> str:
    return (resources.files("ficpd.experiments.report") / name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """Returns plotly.js from plotly's package (MIT; the notice is at its beginning), escaped for a script element."""
    from plotly.offline import get_plotlyjs

    return SCRIPT_END.sub(r"\\x3C", get_plotlyjs())
