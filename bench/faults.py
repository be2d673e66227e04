"""What processes, disks, clocks and lines do in practice: each fault many times, at random places and moments.

python bench/faults.py [tries] [--only TEXT]      20 tries each, 15 min on two cores; as root, or the full disk is left out

Two sites and a coordinator's half on the tiny backbone, four rounds, every process one that can really be killed
(tests/processes.py). An update is lost if it does not count in a round; it is paid and lost if the site's ledger has paid
for it all the same. ε spent twice: prices beyond one for each order, or two different updates for one price. Data lost: an
update that left and that the ledger does not know, or a finished round that a resumed run does not have.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import processes
from ficpd.deployment.site.site import LEDGER
from measure import save
from processes import Place, account, recipe, rounds, served
from warm import Warm, clock, kill, slow

SITES, ROUNDS, AT_ONCE = 2, 4, 4
SETTLE, SEND = "ficpd.privacy.ledger:Account.commit", "ficpd.deployment.site.site:Site._witness"
Fault = Callable[[Random, Warm, list[Place], Path], None]


def killed_at(moment: str) -> Fault:
    """A site dies there in a random order of its own, and is back for the next round."""

    def fault(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
        victim, round = started(random, places, lambda round: kill(moment, round))
        served(places, out, {f"round {round}/": victim.restart}, ROUNDS)

    return fault


def killed_any_time(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    """A site dies at any moment of the run, and is back as soon as a process can be."""
    victim, _ = started(random, places)
    after = random.uniform(0.1, 1.0)

    def dies() -> None:
        time.sleep(after)
        victim.restart()

    dying = threading.Thread(target=dies)
    begins = {f"{SITES} sites": dying.start}
    served(places, out, begins, ROUNDS)
    dying.join()


def too_slow(accept_late: int) -> Fault:
    def fault(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
        started(random, places, lambda round: slow(SETTLE, random.uniform(2.0, 2.5), min(round, ROUNDS - 1)))
        served(places, out, None, ROUNDS, accept_late, deadline_seconds=1.5)

    return fault


def server_killed(power_cut: bool) -> Fault:
    """The server dies at any moment, with `power_cut` the sites with it; all start again, and the run goes on."""

    def fault(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
        started(random, places)
        sockets = {place.node: place.config.socket for place in places}
        given = {"text": recipe(rounds=ROUNDS), "out": out, "sockets": sockets}
        log = out.with_suffix(".log")
        server = warm.ask(coordinate=given, faults=[], log=log)
        time.sleep(random.uniform(0.2, 1.5))
        os.kill(server, signal.SIGKILL)
        if power_cut:
            for place in places:
                place.restart()
        before = rounds(out) if (out / "rounds.jsonl").exists() else []
        warm.ended(server)
        assert warm.ended(warm.ask(coordinate=given | {"resume": True}, faults=[], log=log)) == 0, log.read_text()
        assert rounds(out)[: len(before)] == before, "a finished round is gone"

    return fault


def disk_full(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    victim, round = random.choice(places), random.randint(1, ROUNDS - 1)
    state = victim.config.state
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(state)], check=True)
    try:
        for place in places:
            place.start()
        filling = state / "filling"

        def fill() -> None:
            with open(filling, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(random.choice([512, 4096])))
                except OSError:
                    return

        served(places, out, {f"round {round}/": fill, f"round {round + 1}/": filling.unlink}, ROUNDS)
        victim.stop()
        shutil.copytree(state, state.with_name("copy"))
    finally:
        victim.stop()
        subprocess.run(["umount", str(state)], check=True)
    state.rmdir()
    state.with_name("copy").rename(state)


def half_written(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    """Cut anywhere; a site either finds every order, or does not start until it has its copy back."""
    victim, round = started(random, places)
    copy = out.with_suffix(".copy")

    def cut() -> None:
        victim.stop(random.choice([signal.SIGKILL, signal.SIGTERM]))
        state = victim.config.state
        shutil.copytree(state, copy)
        file = random.choice([file for file in state.glob(LEDGER + "*") if file.stat().st_size])
        os.truncate(file, random.randrange(file.stat().st_size))
        try:
            victim.start()
        except AssertionError as refused:
            if "Traceback" in str(refused):
                raise
            victim.ended()
            shutil.rmtree(state)
            shutil.copytree(copy, state)
            victim.start()

    served(places, out, {f"round {round}/": cut}, ROUNDS)


def clock_off(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    day = 24 * 3600
    victim, round = started(random, places, lambda round: clock(random.uniform(-day, day)))
    served(places, out, {f"round {round}/": lambda: victim.restart(clock(random.uniform(-day, day)))}, ROUNDS)


def astray(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    """Of all eight orders two come twice, two once more after the next; one is lost, and the answer to another."""
    started(random, places)
    orders = [(place.node, number) for place in places for number in range(1, ROUNDS + 1)]
    random.shuffle(orders)
    fates = dict.fromkeys(orders[:2], "twice") | dict.fromkeys(orders[2:4], "after")
    fates |= {orders[4]: "lost", orders[5]: "unanswered"}
    served(places, out, None, ROUNDS, fates=fates, deadline_seconds=1.5)


def line_cut(random: Random, warm: Warm, places: list[Place], out: Path) -> None:
    """A node is gone for a round or two."""
    victim, round = started(random, places)
    gone: set[int] = set()
    back = min(round + random.choice([1, 2]), ROUNDS)
    cut = {f"round {round}/": lambda: gone.add(victim.node), f"round {back}/": gone.clear}
    served(places, out, cut, ROUNDS, gone=gone)


def started(random: Random, places: list[Place], fault: Callable[[int], dict] | None = None) -> tuple[Place, int]:
    """All of them; the one that something befalls, and the round, which is not the last."""
    victim, round = random.choice(places), random.randint(1, ROUNDS - 1)
    for place in places:
        place.start(*([fault(round)] if fault and place is victim else []))
    return victim, round


FAULTS: dict[str, Fault] = {
    "site killed before its ledger's commit": killed_at(SETTLE),
    "site killed between commit and answer": killed_at(SEND),
    "site killed at any moment, started again": killed_any_time,
    "site slower than the deadline": too_slow(0),
    "site slower than the deadline, accept_late = 1": too_slow(1),
    "server killed at any moment, resumed": server_killed(False),
    "server and all sites killed at any moment": server_killed(True),
    "line to a site cut": line_cut,
    "disk of a site full for a round": disk_full,
    "ledger of a site cut off anywhere": half_written,
    "clock of a site up to a day off": clock_off,
    "messages twice, late and lost": astray,
}


@contextmanager
def federation(warm: Warm) -> Iterator[tuple[list[Place], Path]]:
    with processes.places(warm, SITES) as places, tempfile.TemporaryDirectory() as folder:
        yield places, Path(folder) / "run"


def tried(fault: Fault, seed: int, warm: Warm) -> Counter[str]:
    with federation(warm) as (places, out):
        fault(Random(seed), warm, places, out)
        for place in places:
            place.stop()
        accounts = [account(place, out) for place in places]
        done = rounds(out) if (out / "rounds.jsonl").exists() else []
    counted = sum(round["updates"] for round in done)
    return Counter(
        {
            "rounds lost": ROUNDS - len(done),
            "updates lost": SITES * ROUNDS - counted,
            "of them paid": sum(len(book.orders) for book in accounts) - counted,
            "ε spent twice": sum(book.twice for book in accounts),
            "data lost": sum(len(book.missing) for book in accounts),
        }
    )


def all_tries(name: str, tries: int) -> dict[str, int]:
    began, sums, warm = time.time(), Counter[str](), Warm()
    try:
        for seed in range(tries):
            sums.update(tried(FAULTS[name], seed, warm))
    finally:
        warm.close()
    print(f"{name:48} {dict(sums)} {time.time() - began:.0f} s", flush=True)
    return {"tries": tries, "rounds": tries * ROUNDS, "updates": tries * ROUNDS * SITES, **sums}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tries", type=int, nargs="?", default=20)
    options.add_argument("--only", default="", help="faults whose name contains this")
    given = options.parse_args()
    tries = given.tries
    names = [name for name, fault in FAULTS.items() if fault is not disk_full or os.geteuid() == 0]
    names = [name for name in names if given.only in name]
    setting = f"{SITES} sites, {ROUNDS} rounds, tiny backbone, over sockets; {AT_ONCE} federations at once"
    table: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        works = {pool.submit(all_tries, name, tries): name for name in names}
        for work in as_completed(works):
            table[works[work]] = work.result()
            save("faults", {"setting": setting, "faults": {name: table[name] for name in names if name in table}})
    columns = list(next(iter(table.values())))
    print("\n".join(["| fault | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]))
    for name in names:
        print(f"| {name} | " + " | ".join(str(table[name][column]) for column in columns) + " |")


if __name__ == "__main__":
    main()
