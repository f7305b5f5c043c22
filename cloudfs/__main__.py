"""`python -m cloudfs`: the command line."""

from cloudfs.cli import main

raise SystemExit(main())
