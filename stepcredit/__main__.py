"""`python -m stepcredit`."""

import sys

from stepcredit.cli.main import main

sys.exit(main())
