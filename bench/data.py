"""The sets that the benches read: fetched from their public sources, or copied from a folder of prepared files.

python bench/data.py [--out data] [--from FOLDER|web] [--only NAME ...]

`--from` is `../shared/data` where that folder is there, else `web`. A prepared file is copied if its SHA-256 is the one of
`SETS`. A raw file is fetched once, and its SHA-256 is either known (`Raw.sha256`) or recorded in `data.lock.json` by the
first fetch; a raw file with another one is refused. After a conversion, the rows are compared with the published tables'
rows. Other rows give other figures, and the output says so.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch.hub import download_url_to_file

import data_formats as formats
from ficpd.storage import atomic_write

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data"
LOCK = Path(__file__).parent / "data.lock.json"
GITHUB = "https://raw.githubusercontent.com/"
SIB = (
    "eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn", "ita_Latn", "por_Latn", "rus_Cyrl", "zho_Hans", "jpn_Jpan", "kor_Hang",
    "arb_Arab", "hin_Deva", "tur_Latn", "vie_Latn", "tha_Thai", "ell_Grek", "swh_Latn", "urd_Arab", "bul_Cyrl", "pol_Latn",
    "nld_Latn", "ukr_Cyrl", "ind_Latn", "fin_Latn",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A raw file: where it is, and its SHA-256 as others publish it (empty: the first fetch records it)."""

    url: str
    sha256: str = ""


@dataclass(frozen=True)
class DataSet:
    """A set of the benches: its sources, its terms, its converter, and the SHA-256 of its published file and rows."""

    raw: Sequence[Raw]
    licence: str
    convert: Callable[[Sequence[Path]], pd.DataFrame]
    file_sha256: str
    rows_sha256: str
    differs: str = ""
    """Why a conversion cannot have the published rows."""


def of_github(repository: str, commit: str, *paths: str) -> list[Raw]:
    """Names files of a repository at one commit, so that the source cannot change them."""
    return [Raw(f"{GITHUB}{repository}/{commit}/{path}") for path in paths]


SETS = {
    "banking77": DataSet(
        of_github(
            "PolyAI-LDN/task-specific-datasets", "dfe22170dcf22ab022af2e2696cebc612fccb03d", "banking_data/train.csv",
            "banking_data/test.csv",
        ),
        "CC BY 4.0", formats.banking77,
        "ba374ad3968ce607e76514df4be6eb8f75f35c3ec7a9284c36253f7e8fe1a194",
        "68c9007484b055df2bcfad656f7cc4349a98629d32f5f7605e471e2c31c6368a",
    ),
    "clinc150": DataSet(
        [
            Raw(f"{GITHUB}clinc/oos-eval/master/data/data_full.json",
                "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"),
            Raw(f"{GITHUB}clinc/oos-eval/master/data/domains.json",
                "b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a"),
        ],
        "CC BY 3.0", formats.clinc150,
        "4bb14a9a16a22632baf618be603df55b526dfc3ad3819421473e81e27b2bb216",
        "0741ef8c5a177baa109dc700a9b53b7100b589405b81072f4e7cb9ca588eb575",
    ),
    "medical_abstracts": DataSet(
        of_github(
            "sebischair/Medical-Abstracts-TC-Corpus", "547596568102fe3ec008d94a486fd7f55876c433", "medical_tc_test.csv"
        ),
        "CC BY-SA 3.0", formats.medical_abstracts,
        "5e74d044a55760945c80c264b267333a61681d5e8c08e2d78bcb8f4bf7504f5f",
        "9f26c1440a3d068a894cc7a42f6b27efa511914d620928762bbd264a122ce6f0",
    ),
    "medmcqa": DataSet(
        of_github("Teddy-XiongGZ/MIRAGE", "224ebe9a721e1bc525a07b10eceb01ed52df7b29", "rawdata/medmcqa/data/dev.json"),
        "MIT", formats.medmcqa,
        "b44fd00f09268a7956436cf7b45d067796080e677b075dfa91e8ea3484e03995",
        "d9c73b5c7d4e67f5cc1adff63c8625121d8f8d8201d07f1d98c72c474aa7d5fc",
    ),
    "medqa_usmle4": DataSet(
        [
            *of_github("stellalisy/mediQ", "63acb4ccbbc082a3a7895b79d27f51204f6f9aa7", "data/all_dev_good.jsonl"),
            *of_github("Teddy-XiongGZ/MIRAGE", "224ebe9a721e1bc525a07b10eceb01ed52df7b29",
                       "rawdata/medqa/data_clean/questions/US/4_options/phrases_no_exclude_test.jsonl"),
        ],
        "MIT (MedQA), CC BY 4.0 (MediQ)", formats.medqa_usmle4,
        "3331ec8280a83834cd9fc34df8c7242022ca4ca7cdb4f881d8188615131ce4b4",
        "10dd49eb077989a51d77474b6f4fba84ae3c8b1b8f8e21a9b1a741087ad2868d",
    ),
    "medquad": DataSet(
        [Raw("https://codeload.github.com/abachaa/MedQuAD/zip/7e94c7b336f1f8e010c03091df691c8bea014399")],
        "CC BY 4.0", formats.medquad,
        "f95c53d24158bccc49ab25deb3dce7e2c8344404bf7ac1396791eeb6a05f5e68",
        "cfd7d382ff7553607a5fed0d6da3ccbf492b024f58e9e865771c7441507ea8c8",
        "the published documents were divided elsewhere; seed 7 divides them here",
    ),
    "mnist_t10k": DataSet(
        [
            Raw("https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            Raw("https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ],
        "CC BY-SA 3.0", formats.mnist_t10k,
        "aa33a4dbbb3f2e8a370563b4a9485e0d0b8200940527c5d79f20ec815f720ed7",
        "a97cc7e5492c5f3c1c9c8de763fa9b105052cf7abf158cf721bd2c4d29e311a5",
    ),
    "pawsx": DataSet(
        [Raw("https://storage.googleapis.com/paws/pawsx/x-final.tar.gz")],
        "any purpose, Google LLC to be named", formats.pawsx,
        "eb16dfbbc0e3490db82063b57f78f6f5cd674148fcfba1b1f0723a1030c68cde",
        "67b3564c8390a5a1f3e4a1d43e2aad0ccad4c36b4c42e48a6b7e5c704ed98b31",
    ),
    "pubmedqa": DataSet(
        [
            *of_github("pubmedqa/pubmedqa", "1f00b98d5cc626844bf8c4ca513b6e62c40071ec", "data/ori_pqal.json"),
            *of_github("pubmedqa/pubmedqa", "3e7616d288b52edaf38f5fd5c59821c7806bde86", "data/test_ground_truth.json"),
        ],
        "MIT", formats.pubmedqa,
        "bd2f5066e958e4e1aa05a5f9ea3de46bf4e69b5ae2782faeae50e4bd3ccc91d7",
        "11c7558d79c76ba17e274cfc1cc433efa4cb88b50fb7e378bc2a2a866e5ba9ae",
    ),
    "sib200": DataSet(
        of_github("dadelani/sib-200", "e7a172159963fd28c65f1ea53a0cea931bd08719",
                  *(f"data/annotated/{lang}/{part}.tsv" for lang in SIB for part in ("train", "dev", "test"))),
        "CC BY-SA 4.0", formats.sib200,
        "b211fd7f620f351f11fc200572edc3d9fd583fca1c3c369c0a144f375b87592a",
        "7b3fc45257cb2df78cbf6e6d3df75cc78d14d14b05dbc8600f46289f7b370829",
    ),
    "xnli": DataSet(
        [Raw("https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip",
             "4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1")],
        "CC BY-NC 4.0", formats.xnli,
        "7a17a252814480b4173d81259a8209670fe69a91a026292e7bd49626a44f8cb2",
        "354fd71ea678aea8114dbb9b05e9ddebdb1f313057edb0983c993b4bf13a2842",
    ),
}  # fmt: skip


def rows_sha256(table: pd.DataFrame) -> str:
    """The SHA-256 of the rows in their order, columns by name: the same from any writer of Parquet."""
    table = table[sorted(table.columns)].astype(object)  # pyright: ignore[reportAssignmentType]
    lines = table.where(table.notna(), None).itertuples(index=False, name=None)
    body = "".join(json.dumps(line, default=lambda cell: cell.hex()) + "\n" for line in lines)
    return hashlib.sha256(body.encode()).hexdigest()


def fetched(raw: Raw, folder: Path, lock: Path) -> Path:
    """A raw file, from `folder` or its source. Refuses one whose SHA-256 is neither known nor that of the first fetch."""
    path = folder.joinpath(*raw.url.split("/")[-2:])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(raw.url, str(path), progress=False)
    kept = json.loads(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    found, expected = hashlib.sha256(path.read_bytes()).hexdigest(), raw.sha256 or kept.get(raw.url)
    if expected and found != expected:
        raise ValueError(
            f"{path} of {raw.url} has the SHA-256 {found}, expected {expected}; delete the file and try again"
        )
    if not expected:
        atomic_write(lock, json.dumps(dict(sorted({**kept, raw.url: found}.items())), indent=2) + "\n")
    return path


def converted(name: str, out: Path, lock: Path) -> str:
    """Fetches a set and writes it as the benches read it. Returns what to know of its rows."""
    one = SETS[name]
    table = one.convert([fetched(raw, out / "raw" / name, lock) for raw in one.raw])
    atomic_write(out / f"{name}.parquet", table.to_parquet(index=False))
    if rows_sha256(table) == one.rows_sha256:
        return f"{len(table):,} rows, those of the published tables"
    why = one.differs or "the source, or what reads it, has changed"
    return f"{len(table):,} rows, NOT those of the published tables, so figures differ: {why}"


def copied(name: str, file: Path, out: Path) -> str:
    """Copies a prepared file if it is the one of the published tables."""
    found, expected = hashlib.sha256(file.read_bytes()).hexdigest(), SETS[name].file_sha256
    if found != expected:
        raise ValueError(f"{file} has the SHA-256 {found}, the published tables' file {expected}; use --from web")
    writing = out / f"{name}.parquet.writing"
    shutil.copyfile(file, writing)
    writing.replace(out / f"{name}.parquet")
    return "copied, the file of the published tables"


def prepare(names: Iterable[str], source: str, out: Path, lock: Path) -> list[str]:
    """Prepares the sets one by one, and prints a line of each. Returns the names of those that failed."""
    failed = []
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = Path(source) / f"{name}.parquet"
        try:
            said = copied(name, file, out) if source != "web" and file.exists() else converted(name, out, lock)
        except (OSError, ValueError, LookupError) as error:
            failed.append(name)
            said = f"failed: {error}"
        print(f"{name:18} {said} ({SETS[name].licence})", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of the prepared files")
    parser.add_argument("--from", dest="source", default=str(BESIDE) if BESIDE.is_dir() else "web",
                        help="a folder of prepared files (what it lacks is fetched), or web")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=sorted(SETS), default=sorted(SETS), metavar="NAME")
    parser.add_argument("--lock", type=Path, default=LOCK, help="SHA-256 of raw files, recorded by the first fetch")
    args = parser.parse_args()
    if args.source != "web" and not Path(args.source).is_dir():
        parser.error(f"--from {args.source}: there is no such folder; name one of prepared files, or web")
    if failed := prepare(args.only, args.source, args.out, args.lock):
        sys.exit(f"not prepared: {', '.join(failed)}")


if __name__ == "__main__":
    main()
