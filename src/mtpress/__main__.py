"""`python -m mtpress`."""

from mtpress.cli import main

raise SystemExit(main())
