"""`python -m cloudfs`: the command line."""

from cloudfs.start import main

raise SystemExit(main())
