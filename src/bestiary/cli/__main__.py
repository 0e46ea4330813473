"""`python -m bestiary.cli`, for environments whose scripts are not on the path."""

import sys

from bestiary.cli import main

sys.exit(main())
