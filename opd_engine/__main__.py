"""`python -m opd_engine` is the `opd-engine` command."""

from opd_engine.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
