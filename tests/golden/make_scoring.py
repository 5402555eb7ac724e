"""Packs recorded official scores for this repository: ``python tests/golden/make_scoring.py SOURCE``.

One archive, because a thousand short texts take a tenth of the room there; the same bytes for the same content.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

TARGET = Path(__file__).parent / "scoring" / "set.tar.xz"
MOST_BYTES = 500_000


def main(source: Path) -> None:
    with tarfile.open(TARGET, "w:xz", preset=9) as archive:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(str(file.relative_to(source)))
            member.size, member.mode = file.stat().st_size, 0o644
            with file.open("rb") as opened:
                archive.addfile(member, opened)
    assert TARGET.stat().st_size <= MOST_BYTES, f"{TARGET} has {TARGET.stat().st_size:,} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
