"""`python -m upparam` is the same as `upparam`."""

import sys

from upparam.cli import main

sys.exit(main())
