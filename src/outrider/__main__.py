"""The command `outrider`, and `python -m outrider`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends without a traceback, as it does later."""
    try:
        from outrider.cli.main import main as run
    except KeyboardInterrupt:
        print("\noutrider: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # `cli.ending.INTERRUPTED`, which may not be there yet
    run()


if __name__ == "__main__":
    main()
