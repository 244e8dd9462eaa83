"""`python -m rove.cli`."""

import sys

from rove.cli import main

sys.exit(main())
