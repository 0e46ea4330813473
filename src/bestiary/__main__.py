"""`python -m bestiary VERB ...`."""

import sys

from bestiary.cli import main

sys.exit(main())
