"""``python -m bench``: a training step timed and weighed beside vector-quantize-pytorch's."""

import os

# as examples/startup.py has it, before anything imports torch
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
