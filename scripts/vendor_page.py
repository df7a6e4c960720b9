"""Fetches the libraries of the chat page anew, as `vendor.json` pins them, with npm.

    python scripts/vendor_page.py            # fails when a fetched file differs from its pinned sha256
    python scripts/vendor_page.py --update   # writes the sha256 of what was fetched: after editing a version

`npm pack` only downloads; no code of a package is run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "src/danlu/server/page/vendor"
PINNED = VENDOR / "vendor.json"


def main() -> None:
    update = sys.argv[1:] == ["--update"]
    libraries = json.loads(PINNED.read_text("utf-8"))
    for library in libraries:
        contents = fetch(library["npm"], library["version"], [library["source"], library["license_source"]])
        for content, field in zip(contents, ("file", "license_file"), strict=True):
            name, found = library[field], hashlib.sha256(content).hexdigest()
            if update:
                library[f"{field}_sha256"] = found
            elif library[f"{field}_sha256"] != found:
                sys.exit(f"{name}: {library['npm']}@{library['version']} holds another file (sha256 {found})")
            (VENDOR / name).write_bytes(content)
            print(f"{name}  {len(content):,} bytes  {found}")
    if update:
        PINNED.write_text(json.dumps(libraries, indent=2) + "\n", "utf-8")


def fetch(package: str, version: str, members: list[str]) -> list[bytes]:
    """Files of a package as it was published."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=scratch, check=True, stdout=subprocess.DEVNULL
        )
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            found = [archive.extractfile(f"package/{member}") for member in members]
            return [file.read() for file in found if file is not None]


if __name__ == "__main__":
    main()
