"""The Dockerfile and the compose file name commands, options and extras that exist, and mount no more than they should."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from ficpd.cli import app

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "ficpd"}
UNITS = "".join(file.read_text() for file in (ROOT / "src/ficpd/deployment/templates").rglob("*.service"))


def mounts(service: str) -> dict[str, str]:
    """The place in the container of each mount, with its mode."""
    given = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {place: mode[0] if mode else "rw" for _, place, *mode in given}


@pytest.mark.parametrize("name", OURS)
def test_each_command_exists_with_its_options(name):
    program, *words = SERVICES[name]["command"]
    if program != "ficpd":
        assert program in {point.name for point in distribution("flwr").entry_points}
        assert {word.partition("=")[0] for word in words} <= {*re.findall(r"--[a-z-]+", UNITS)}
        return
    command = get_command(app)
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command = inner
        words.pop(0)
    assert not hasattr(command, "commands"), words
    command.make_context(name, list(words))


def test_a_command_that_does_not_exist_is_caught():
    with pytest.raises(Exception, match="No such option"):
        get_command(app).commands["run"].make_context("run", ["recipe.toml", "--outt", "x"])  # type: ignore[attr-defined]


def test_the_image_installs_extras_of_the_package_beside_the_torch_of_the_makefile():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (named,) = re.findall(r"ficpd-\*\.whl\)\[([\w,-]+)\]", DOCKERFILE)
    assert "flower" in named
    assert {*named.split(",")} <= extras.keys()
    (torch,) = re.findall(r"torch==[\d.]+", DOCKERFILE)
    assert torch in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all((ROOT / file).exists() for file in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE"))


def test_nothing_of_ours_runs_as_root_or_writes_into_its_image():
    assert re.search(r"^USER ficpd$", DOCKERFILE, re.MULTILINE)
    for name, service in OURS.items():
        assert not service["user"].startswith(("0", "root")), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


def test_a_site_cannot_write_its_records_or_reach_a_network_and_keeps_its_ledger_on_a_volume():
    assert SERVICES["site"]["network_mode"] == "none"
    seen = mounts("site")
    assert (seen["/srv/ficpd"], seen["/etc/ficpd/site.toml"], seen["/var/lib/ficpd"]) == ("ro", "ro", "rw")
    assert "ledger:/var/lib/ficpd" in SERVICES["site"]["volumes"]
    assert "ledger" in yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["volumes"]
    assert not {"/srv/ficpd", "/var/lib/ficpd", "/etc/ficpd/site.toml"} & mounts("supernode").keys()


def test_superlink_listens_to_its_own_machine_alone():
    words = SERVICES["superlink"]["command"]
    assert {"--host=127.0.0.1", "--enable-supernode-auth"} <= {*words}
    assert SERVICES["nginx"]["network_mode"] == SERVICES["run"]["network_mode"] == "service:superlink"
