"""`python -m deploy` writes what is generated; `--check` names what is not as the code is, and fails."""

from __future__ import annotations

import sys

from deploy.generated import ROOT, files, stale


def main() -> int:
    if "--check" in sys.argv[1:]:
        for path in (behind := stale()):
            print(f"{path.relative_to(ROOT)}: run python -m deploy")
        return 1 if behind else 0
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


sys.exit(main())
