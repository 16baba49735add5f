"""`python -m peft_tsd.cli`."""

import sys

from .main import main

sys.exit(main())
