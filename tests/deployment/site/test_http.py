"""The site's socket: who may reach it, how large a call may be, and what each answer's status says."""

import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

import grids
from ficpd.deployment.site import config, http
from ficpd.deployment.site.preflight import _as_owner, site_status
from ficpd.errors import ConfigError, SiteError
from ficpd.federation import codec
from ficpd.federation.codec import SiteRequest
from site_of import NOISED, begun, context, recipe, site, train

pytestmark = grids.OPEN_SOCKETS


def asked(path: Path, body: bytes, where: str = "train") -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=30, trust_env=False) as client:
        return client.post(f"http://site/{where}", content=body)


def test_every_answer_has_a_status_of_its_own(tmp_path, monkeypatch):
    one = context(tmp_path, "fedavg", *NOISED)
    orders, said = begun(one)
    with grids.short_folder() as folder, grids.answering(site(one, "site-0", folder, max_rounds=2)) as path:
        hello = asked(path, codec.encode_call(SiteRequest("hello")), "query")
        assert (hello.status_code, hello.json()["name"], hello.json()["card"]) == (200, "site-0", {"site": "site-0"})
        assert asked(path, train(orders[0])).status_code == 428
        refused = asked(path, train(orders[0], said))
        assert (refused.status_code, refused.json()["refused"]) == (409, True)
        assert "max_rounds" not in refused.json()["error"]
        assert "federation.num_rounds = 3" in refused.json()["error"]
        for body in (b"", b"nonsense", train(orders[0])[:-1], codec.encode_call(SiteRequest("copy the records"))):
            assert asked(path, body).status_code == 422
        monkeypatch.setattr(http, "LARGEST", 1000)
        assert asked(path, b"x" * 1001).status_code == 413
        assert asked(path, codec.encode_call(SiteRequest("hello")), "records").status_code == 404


def test_the_socket_is_its_owners_alone_and_goes_when_the_site_goes():
    with grids.short_folder() as folder:
        path = folder / "a.sock"
        sock = http.bind_socket(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(SiteError, match="another process answers"):
            http.bind_socket(path)
        sock.close()
        again = http.bind_socket(path)  # what a dead process left there
        again.close()
        path.unlink()
        path.write_text("not a socket")
        with pytest.raises(SiteError, match="is no socket"):
            http.bind_socket(path)
        with pytest.raises(SiteError, match="no folder"):
            http.bind_socket(folder / "nowhere" / "a.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket to somebody else")
def test_another_users_socket_or_state_is_left_alone(tmp_path):
    with grids.short_folder() as folder:
        path = folder / "a.sock"
        http.bind_socket(path).close()
        os.chown(path, 54321, 54321)
        with pytest.raises(SiteError, match="belongs to user 54321"):
            http.bind_socket(path)
        one = context(tmp_path)
        (folder / "site-0").mkdir()
        os.chown(folder / "site-0", 54321, 54321)
        with pytest.raises(SiteError, match="belongs to user 54321"):
            site(one, "site-0", folder)


@pytest.mark.slow
def test_a_socket_that_systemd_hands_over_is_used_as_it_is():
    """It has to live: a socket object that is dropped closes it."""
    with grids.short_folder() as folder:
        path = folder / "a.sock"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        code = (
            "import os; os.dup2(int(os.environ['GIVEN']), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "from ficpd.deployment.site.http import systemd_socket\n"
            "sock = systemd_socket(); print(sock.getsockname())"
        )
        environment = {**os.environ, "LISTEN_FDS": "1", "GIVEN": str(listening.fileno())}
        how = {"env": environment, "pass_fds": [listening.fileno()], "capture_output": True, "text": True}
        run = subprocess.run([sys.executable, "-c", code], **how)
        listening.close()
        assert run.stdout.strip() == str(path), run.stderr
        assert http.systemd_socket() is None


def test_a_path_that_is_too_long_is_an_error_of_the_file(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(
        f'name = "a"\nsocket = "/{"x" * 120}"\nstate = "s"\n[task]\nname = "classification"\n'
        'labels = { a = "a", b = "b" }\n'
        '[data]\nsource = "ratings"\n[policy]\nepsilon = 1.0\n'
    )
    with pytest.raises(ConfigError, match=r"site\.toml.*socket.*at most 107 bytes, this one 121"):
        config.read(file)


@pytest.mark.parametrize(("text", "words"), [
    ("name = 1\nnames = 2", "unknown part 'names'; did you mean 'name'"),
    ("[policy]\nepsilonn = 2", "unknown key 'epsilonn'; did you mean 'epsilon'"),
    ("[policy]\nepsilon = -2", "policy.epsilon = -2"),
    ("name = ", "is not TOML"),
    ('name = "a/b"', "make a name"),
])  # fmt: skip
def test_a_mistake_in_the_sites_file_is_named(tmp_path, text, words):
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        config.read(file)


def test_lines_are_found_in_every_way_of_writing_toml():
    text = 'seed = 1\n[policy]\n# epsilon = 9\nepsilon = 2\n[groups.a.task]\n"name" = "x"\n[data]\ncolumns.text = "t"\n'
    keys = ("seed", "policy.epsilon", "groups.a.task.name", "data.columns.text")
    found = [config.line_number(text, key) for key in keys]
    assert found == [1, 4, 6, 8]
    assert config.line_number(text, "policy.delta") is None
    assert config.location("site.toml", text, "policy.delta") == "site.toml, by default"


def test_status_is_read_from_the_state_folder_while_the_site_runs_and_after(tmp_path):
    one = context(tmp_path, "fedavg", *NOISED)
    orders, said = begun(one)
    with grids.short_folder() as folder:
        file = folder / "site.toml"
        file.write_text(
            f'name = "site-0"\nsocket = "site-0.sock"\nstate = "site-0"\n[task]\nname = "classification"\n'
            f'labels = {{ a = "a", b = "b" }}\n[data]\nsource = "{tmp_path / "records.csv"}"\n[policy]\nepsilon = 1.0\n'
        )
        before = site_status(file)
        assert (before["running"], before["epsilon"]["spent"], before["runs"], before["last_error"]) == (
            False, 0, {}, None,
        )  # fmt: skip
        own = site(one, "site-0", folder)
        with grids.answering(own):
            asked(own.config.socket, train(orders[0], said))
            running = site_status(file)
        rest = site_status(file)
        assert (running.pop("running"), rest.pop("running")) == (True, False)
        assert rest == running
        assert rest["epsilon"]["spent"] > 0
        assert [run["rounds_served"] for run in rest["runs"].values()] == [1]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as somebody else")
def test_root_looks_with_the_owners_eyes_and_nobody_else_looks(tmp_path):
    code = (
        "import os, sys; from ficpd.deployment.site.preflight import _as_owner; from pathlib import Path; os.setuid(54322)\n"
        "_as_owner(Path(sys.argv[1])).__enter__()"
    )
    with grids.short_folder() as folder:
        folder.chmod(0o755)
        (folder / "state").mkdir()
        os.chown(folder / "state", 54321, 54321)
        with _as_owner(folder / "state"):
            (folder / "state" / "file").touch()
        assert (folder / "state" / "file").stat().st_uid == 54321
        run = subprocess.run([sys.executable, "-c", code, str(folder / "state")], capture_output=True, text=True)
        assert "belongs to user 54321" in run.stderr


@pytest.mark.slow
def test_check_says_what_would_leave_and_whether_the_policy_allows_a_recipe(tmp_path):
    from ficpd.deployment.site.preflight import preflight_lines
    from ficpd.errors import PolicyError

    one = context(tmp_path, "fedavg", *NOISED, "training.local_steps=3")
    (tmp_path / "recipe.toml").write_text(recipe(one))
    task = 'name = "classification"\ninstruction = "it was"\nlabels = { good = "good fine", bad = "bad dull" }'
    file = tmp_path / "site.toml"
    file.write_text(
        f'name = "site-0"\nsocket = "s.sock"\nstate = "state"\n[card]\ncountry = "north"\n[backbone]\nname = "tiny"\n'
        f'options = {{ width = 16 }}\n[task]\n{task}\n[data]\nsource = "{tmp_path / "records.csv"}"\n'
        "[policy]\nepsilon = 8.0\ndelta = 1e-3\n"
    )
    said = "\n".join(preflight_lines(file, tmp_path / "recipe.toml", 3))
    for words in (
        "country = north", "noised by record_gaussian", "the policy allows it", "bytes in round one",
        "cost      epsilon 4 for 3 rounds",
    ):  # fmt: skip
        assert words in said
    assert not (tmp_path / "state").exists()
    file.write_text(file.read_text() + "max_local_steps = 2\n")
    limit = r"recipe.toml line \d+: training.local_steps = 3; site.toml line 18: at most 2"
    with pytest.raises(PolicyError, match=limit):
        list(preflight_lines(file, tmp_path / "recipe.toml", 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun_with", [b"", b"POST /train HTT", b"POST /train HTTP/1.1\r\nHost: site\r\nContent-Length: 9\r\n\r\nab"]
)
def test_requests_that_do_not_end_do_not_shut_the_site_for_others(tmp_path, monkeypatch, begun_with):
    monkeypatch.setattr(http, "SECONDS_OF_SILENCE", 2)
    hello = codec.encode_call(SiteRequest("hello"))
    with ExitStack() as stack, grids.short_folder() as folder:
        path = stack.enter_context(grids.answering(site(context(tmp_path, "fedavg", *NOISED), "site-0", folder)))
        for _ in range(70):
            waiting = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            waiting.connect(str(path))
            waiting.sendall(begun_with)
        until = time.monotonic() + 20
        while (status := asked(path, hello, "query").status_code) == 503 and time.monotonic() < until:
            time.sleep(0.2)
        assert status == 200
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), trust_env=False) as client:
            for _ in range(3):  # one connection that goes on is not cut
                assert client.post("http://site/query", content=hello).status_code == 200
                time.sleep(1)
