#!/usr/bin/env python3
"""Public families against their references, on small checkpoints made here in the public layout.

    python scripts/parity.py [FAMILY ...] [--json FILE]
    python scripts/parity.py FAMILY --goldens          made anew by the official code (see tests/parity/FAMILY.py)

Exit code 1 where a row that was run is wrong, or its control does not show. The cases are in tests/parity.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def family_names() -> list[str]:
    """Those that have a case."""
    return sorted(
        path.stem for path in (ROOT / "tests" / "parity").glob("*.py") if path.stem not in ("common", "test_parity")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(family_names())}; none is all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--goldens", action="store_true", help="run the official code and store what it gives")
    args = parser.parse_args()
    if unknown := set(args.families) - set(family_names()):
        parser.error(f"no case for {', '.join(sorted(unknown))}: there are {', '.join(family_names())}")
    from tests.parity import common
    from unigen.utils.files import write_report

    parity_rows, started = [], time.monotonic()
    print(f"{'row':28} {'error':>9} {'control':>9}  {'':4}  reference; control")
    for name in args.families or family_names():
        case = importlib.import_module(f"tests.parity.{name}")
        if args.goldens:
            folder = common.official_folder(name)
            if folder is None:
                parser.error(f"set UNIGEN_REFERENCE_{name.upper()} to the folder of the official code")
            case.make_goldens(folder)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            case.checkpoint(Path(scratch))
            for row in case.rows(Path(scratch)):
                parity_rows.append(row)
                verdict = "-" if row.skip_reason else "ok" if row.passed else "BAD"
                why = row.skip_reason or f"{row.reference}; {row.mistake}"
                print(f"{row.name:28} {row.error:9.1e} {row.control:9.1e}  {verdict:4}  {why}", flush=True)
    if args.json:
        rows = [
            {"name": row.name, "value": None if row.skip_reason else row.error, "unit": "std", "control": row.control}
            | {"passed": row.passed, "against": row.skip_reason or row.reference, "mistake": row.mistake}
            for row in parity_rows
        ]
        command = f"python scripts/parity.py {' '.join(sys.argv[1:])}"
        write_report(args.json, command=command, model="made here", rows=rows, seconds=time.monotonic() - started)
    return int(any(not row.passed for row in parity_rows if not row.skip_reason))


if __name__ == "__main__":
    sys.exit(main())
