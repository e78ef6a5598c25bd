"""`python -m sla`: see `sla.cli.main`."""

from sla.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
