"""A seed in a site's file makes noise that somebody knows: it is said first, and needs --rehearsal."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import small
from ficpd.cli import app
from ficpd.deployment.site.load import build_site
from ficpd.deployment.site.preflight import preflight_lines
from ficpd.errors import SiteError

SITE = """name = "site-0"
socket = "north.sock"
state = "state"
task = { name = "classification", labels = { good = "good fine", bad = "bad dull" }, instruction = "it was" }
data = { source = "own.csv" }
policy = { epsilon = 2 }
backbone = { name = "tiny" }
simulation = { private_seed = 4 }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    small.table(tmp_path / "own.csv")
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def test_a_site_whose_noise_somebody_knows_opens_for_rehearsals_only(file):
    with pytest.raises(SiteError, match=r"simulation.*private_seed.*--rehearsal"):
        build_site(file, lambda line: None)
    with pytest.raises(SiteError, match=r"simulation.*private_seed.*--rehearsal"):
        list(preflight_lines(file))
    assert not (file.parent / "state").exists()
    said: list[str] = []
    build_site(file, said.append, rehearsal=True).close()
    assert said[0].startswith("REHEARSAL")
    assert next(iter(preflight_lines(file, rehearsal=True))).startswith("REHEARSAL")


def test_the_commands_say_it_in_their_first_line(file):
    shown = CliRunner().invoke(app, ["site", "status", str(file)])
    assert shown.output.startswith("REHEARSAL")
    shown = CliRunner().invoke(app, ["site", "check", str(file), "--rehearsal"])
    assert (shown.exit_code, shown.output[:9]) == (0, "REHEARSAL")
    assert CliRunner().invoke(app, ["site", "check", str(file)]).exit_code != 0
    file.write_text(SITE.replace("simulation = { private_seed = 4 }", ""))
    for command in ("status", "check"):
        assert "REHEARSAL" not in CliRunner().invoke(app, ["site", command, str(file)]).output
