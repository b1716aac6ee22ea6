"""Fetches llama.cpp's test vocabularies out of the source distribution of llama-cpp-python into a folder; runs none of it."""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

VERSION = "0.3.36"
INDEX = f"https://pypi.org/pypi/llama-cpp-python/{VERSION}/json"


def main(out: Path) -> None:
    with urllib.request.urlopen(INDEX, timeout=60) as answer:
        files = json.load(answer)["urls"]
    source = next(file for file in files if file["packagetype"] == "sdist")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "source.tar.gz"
        urllib.request.urlretrieve(source["url"], archive)
        if hashlib.sha256(archive.read_bytes()).hexdigest() != source["digests"]["sha256"]:
            raise SystemExit("the source distribution is not what the index promises: try again")
        out.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and "/models/ggml-vocab-" in member.name:
                    data = tar.extractfile(member)
                    assert data is not None
                    (out / Path(member.name).name).write_bytes(data.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
