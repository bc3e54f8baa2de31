"""`python -m kvtransport`: the command line, see `kvtransport.cli`."""

import sys

from kvtransport.cli import main

sys.exit(main())
