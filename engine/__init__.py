"""Loops and bookkeeping; knows no method by name."""

import os

# Before torch starts its threads: they sleep while they wait. By default they spin, and on a machine where anything else
# runs, two spinning threads slow a small network twenty-fold (96 against 2361 images/s, resnet8, two busy CPU cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
