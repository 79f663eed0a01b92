"""Packs vit_jax's packages and a dataset in small pieces, for a machine without network access.

Run this on a machine with network access and the target machine's Python version and architecture:

    python scripts/gpu_pack.py pack --to PIECES --have HAVE.txt --data TFDS_DIR/cifar10

HAVE.txt is the output of `pip list --format=freeze` on the target machine; packages listed there
are not packed. Copy this repository and the files of PIECES to the target machine, and run there:

    python scripts/gpu_pack.py join --to FOLDER PIECES

Then run the line that it prints, which sets PYTHONPATH and TFDS_DATA_DIR. Both commands need only
the standard library and pip.
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
PIECE = 55 * 2**20  # bytes


class Pieces(io.RawIOBase):
    """A write-only stream that is stored in files of at most `size` bytes."""

    def __init__(self, folder, size=PIECE):
        self.folder, self.size, self.sums, self._rest = folder, size, {}, bytearray()

    def writable(self):
        """Returns True: the stream is write-only."""
        return True

    def write(self, data):
        """Appends bytes."""
        self._rest += data
        while len(self._rest) >= self.size:
            self._store(self._rest[: self.size])
            del self._rest[: self.size]
        return len(data)

    def close(self):
        """Writes the last piece and the checksums."""
        if not self.closed:
            self._store(self._rest)
            (self.folder / "pieces.json").write_text(json.dumps(self.sums, indent=1) + "\n")
        super().close()

    def _store(self, data):
        name = f"piece_{len(self.sums):03}"
        (self.folder / name).write_bytes(data)
        self.sums[name] = hashlib.sha256(data).hexdigest()


def normalized(name):
    """Normalizes the name of a distribution, as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def make_wheels(folder, have):
    """Downloads or builds the wheels that vit_jax needs, except those in `have`."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in have if "==" in line and "@" not in line))
    needed = [f"{ROOT}[sweep]", "pytest", "pytest-xdist", "hypothesis"]
    subprocess.run([*pip, "-w", folder, "-c", constraints, *needed], check=True)
    constraints.unlink()
    present = {normalized(line.partition("==")[0]) for line in have}
    for wheel in folder.glob("*.whl"):
        name = normalized(wheel.name.partition("-")[0])
        if name in present or name == "vit-jax":
            wheel.unlink()


def pack(to, have, data, *, size=PIECE, make_wheels=make_wheels):
    """Writes wheels and data to pieces in the folder `to`."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = pathlib.Path(temporary)
        make_wheels(wheels, have)
        with Pieces(to, size) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            tar.add(wheels, "wheels")
            for path in data:
                tar.add(path, f"tfds/{path.resolve().name}")
        names = ", ".join(sorted(p.name.partition("-")[0] for p in wheels.iterdir()))
    print(f"{len(file.sums)} pieces in {to}; wheels: {names}")


def join(to, pieces):
    """Extracts pieces to the folder `to` and installs their wheels in `to`/site."""
    sums = json.loads((pieces / "pieces.json").read_text())
    for name, digest in sums.items():
        path = pieces / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            sys.exit(f"error: {path} is missing or damaged: copy it again")
    with tempfile.TemporaryFile() as whole:
        for name in sums:
            whole.write((pieces / name).read_bytes())
        whole.seek(0)
        with tarfile.open(fileobj=whole, mode="r|") as tar:
            tar.extractall(to, filter="data")
    wheels = sorted((to / "wheels").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", to / "site"]
    if wheels:
        subprocess.run([*pip, *options, *wheels], check=True)
    print(f"export PYTHONPATH={to.resolve()}/site:{ROOT} TFDS_DATA_DIR={to.resolve()}/tfds")


def main():
    """Runs pack or join."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packs = commands.add_parser("pack", help="write pieces")
    packs.add_argument("--to", type=pathlib.Path, required=True)
    packs.add_argument(
        "--have",
        type=pathlib.Path,
        help="output of pip list --format=freeze on the target machine",
    )
    packs.add_argument("--data", type=pathlib.Path, nargs="*", default=[])
    joins = commands.add_parser("join", help="install from pieces")
    joins.add_argument("--to", type=pathlib.Path, required=True)
    joins.add_argument("pieces", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "join":
        join(args.to, args.pieces)
    else:
        have = args.have.read_text().splitlines() if args.have else []
        pack(args.to, have, args.data)


if __name__ == "__main__":
    main()
