"""The rehearsal itself: eleven processes with TLS and keys, three sites on a real encoder, and nothing left of them."""

import os
from pathlib import Path

import pytest

from ficpd.deployment import demo as rehearsal
from ficpd.library.library import PromptLibrary


def processes() -> dict[int, str]:
    """Command lines that name a folder of the rehearsal."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(file.parent.name)] = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return {pid: line for pid, line in found.items() if pid != os.getpid()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")  # Flower's typer with a newer click
@pytest.mark.parametrize("secure", [False, True])
def test_three_organisations_on_one_machine(tmp_path, capfd, monkeypatch, secure):
    pytest.importorskip("flwr")
    places = []
    init = rehearsal.init
    monkeypatch.setattr(rehearsal, "init", lambda folder, *rest: (places.append(folder.parent), init(folder, *rest)))
    said: list[str] = []
    rehearsal.demo(tmp_path / "out", 2, said.append, secure)
    told = capfd.readouterr().out
    assert PromptLibrary.load(tmp_path / "out" / "library").prompts
    assert "round 2/2: 3 of 3 sites" in told
    for name in rehearsal.SITES:
        assert f"{name} (running)" in told
    assert told.count("of 4 spent") == 3
    assert ("secure sum over 3 sites" in (tmp_path / "out" / "result.json").read_text()) == secure
    (folder,) = places
    assert not folder.exists()
    assert [line for line in processes().values() if str(folder) in line] == []
