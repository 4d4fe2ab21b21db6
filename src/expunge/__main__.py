"""`python -m expunge`."""

import sys

from expunge.cli.main import main

sys.exit(main())
