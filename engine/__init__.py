"""Loops and bookkeeping; knows no method by name."""

import os
import signal
import sys

# Before torch starts its threads: they sleep while they wait. By default they spin, and on a machine where anything else
# runs, two spinning threads slow a small network twenty-fold (96 against 2361 images/s, resnet8, two busy CPU cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ``python -m engine.x`` and ``python -m datafree.x``, which import this first, print no traceback if they are stopped while they
# import the rest; ``run_command`` takes over.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
