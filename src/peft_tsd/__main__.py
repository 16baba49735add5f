"""`python -m peft_tsd`, which launchers of several processes start: `torchrun -m peft_tsd train RECIPE`."""

import sys

from .cli import main

sys.exit(main())
