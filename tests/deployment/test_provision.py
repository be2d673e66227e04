"""`ficpd deploy init`: folders that can be handed out as they are."""

import shutil
import ssl
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from ficpd.deployment.provision import checked_address, init
from ficpd.deployment.site import config as settings
from ficpd.deployment.site import policy
from ficpd.errors import ConfigError
from ficpd.experiments import config as experiment

SITES = ["north", "south-2", "east"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    init(folder, SITES, "federation.example.org:9443")
    return folder


def test_secrets_are_their_owners_alone(made):
    for path in made.rglob("*"):
        secret = path.is_file() and b"PRIVATE KEY" in path.read_bytes()
        assert secret == (path.suffix == ".key"), path
        if secret:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = {name: (made / "sites" / name / "supernode.key").read_bytes() for name in SITES}
    assert len(set(keys.values())) == len(SITES)
    for name in SITES:
        assert [path.name for path in (made / "sites" / name).rglob("*.key")] == ["supernode.key"]
        others = [other for other in SITES if other != name]
        texts = [path.read_text() for path in (made / "sites" / name).iterdir()]
        assert not any(other in text for other in others for text in texts)


def test_a_sites_keys_are_a_pair_of_a_curve_that_flower_takes(made):
    for name in SITES:
        private = load_ssh_private_key((made / "sites" / name / "supernode.key").read_bytes(), None)
        public = load_ssh_public_key((made / "coordinator" / "sites" / f"{name}.pub").read_bytes())
        assert public == private.public_key()
        assert public.curve.name == "secp384r1"
        own, known = made / "sites" / name / "supernode.pub", made / "coordinator" / "sites" / f"{name}.pub"
        assert own.read_bytes() == known.read_bytes()


def test_the_certificate_is_of_the_authority_and_for_the_address(made):
    server = x509.load_pem_x509_certificate((made / "coordinator" / "server.crt").read_bytes())
    ca = x509.load_pem_x509_certificate((made / "ca" / "ca.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {*names.get_values_for_type(x509.DNSName)} == {"federation.example.org", "localhost"}
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    assert (made / "sites" / "north" / "ca.crt").read_bytes() == (made / "ca" / "ca.crt").read_bytes()
    assert ca.not_valid_after_utc > server.not_valid_after_utc
    shown = (made / "README.md").read_text()
    assert server.not_valid_after_utc.date().isoformat() in shown
    assert ca.not_valid_after_utc.date().isoformat() in shown
    # as OpenSSL sees it when it has to serve it
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "coordinator" / "server.crt", made / "coordinator" / "server.key")


@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")  # Flower's typer with a newer click
def test_recipe_and_sites_agree(made):
    pytest.importorskip("flwr")
    text = (made / "coordinator" / "recipe.toml").read_text()
    recipe = experiment.parse(text, "recipe.toml", records=False)
    assert recipe.privacy["epsilon"] == 2.0
    for name in SITES:
        site = settings.read(made / "sites" / name / "site.toml")
        assert (site.name, site.socket) == (name, Path(f"/run/ficpd/{name}.sock"))
        assert site.simulation is None
        assert site.task == recipe.task
        assert site.backbone == recipe.backbone
        assert site.exact
        assert recipe.method["name"] in site.policy.methods
        assert policy.mechanism_name(recipe.privacy) in site.policy.mechanisms
        assert recipe.privacy["epsilon"] <= site.policy.epsilon
        assert recipe.training.local_steps <= site.policy.max_local_steps
        assert recipe.training.batch_size <= site.policy.max_batch_size
        assert recipe.federation.num_rounds <= site.policy.max_rounds
    assert recipe.engine.options["sites"] == SITES


def test_nothing_is_left_to_fill_in(made):
    for path in made.rglob("*"):
        assert not (path.is_file() and path.suffix != ".key" and "@NAME@" in path.read_text()), path
    assert "9443 ssl" in (made / "coordinator" / "nginx.conf").read_text()
    config = tomllib.loads((made / "coordinator" / "config.toml").read_text())
    assert f"server {config['superlink']['ficpd']['address']};" in (made / "coordinator" / "nginx.conf").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_units(made, tmp_path):
    """Verified as they are, but for the place of the programs, which are not installed here."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ficpd", "flower-supernode", "flower-superlink"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    for folder in (made / "sites" / "north", made / "coordinator"):
        for unit in [*folder.glob("*.service"), *folder.glob("*.socket")]:
            (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/ficpd/bin/", f"{programs}/"))
    units = sorted(str(path) for path in tmp_path.glob("ficpd-*"))
    assert len(units) == 4
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_the_supernode_cannot_look_at_the_site(made):
    site = settings.read(made / "sites" / "north" / "site.toml")
    unit = (made / "sites" / "north" / "ficpd-supernode.service").read_text()
    hidden = next(line for line in unit.splitlines() if line.startswith("InaccessiblePaths="))
    for path in (site.state, Path(site.data.source), Path("/etc/ficpd/site.toml"), Path("/var/cache/ficpd")):
        assert any(f"-{parent}" in hidden.replace("=", " ").split() for parent in (path, *path.parents)), path
    users = {
        name: [line for line in (made / "sites/north" / name).read_text().splitlines() if "User=" in line]
        for name in ("ficpd-site.service", "ficpd-site.socket", "ficpd-supernode.service")
    }
    assert users["ficpd-site.service"] == ["User=ficpd-site"]
    assert users["ficpd-site.socket"] == ["SocketUser=ficpd-supernode"]
    assert users["ficpd-supernode.service"] == ["User=ficpd-supernode"]


@pytest.mark.parametrize(
    ("sites", "word"),
    [([], "no sites"), (["north", "north"], "twice"), (["../up"], "letters"), (["North"], "small"), ([""], "''"),
     (["a" * 33], "32"), (["-a"], "hyphens"), (["a\n"], "letters")],
)  # fmt: skip
def test_odd_sites_are_refused(tmp_path, sites, word):
    with pytest.raises(ConfigError, match=word):
        init(tmp_path / "new", sites, "127.0.0.1:9443")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address",
    ["host", "host:", ":9443", "host:0", "host:65536", "host:x", "::1:9443", "[host]:1", "1.2.3:1", "a b:1", "-a:1",
     "https://host:1", "host:²", "host:1\n", "a;b:1"],
)  # fmt: skip
def test_odd_addresses_are_refused(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        checked_address(address)


def test_nothing_that_is_there_is_written_over(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path, ["a"], "127.0.0.1:9443")
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path / "kept", ["a"], "127.0.0.1:9443")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    init(tmp_path / "empty", ["a"], "127.0.0.1:9443")
    assert (tmp_path / "empty" / "sites" / "a" / "site.toml").exists()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
