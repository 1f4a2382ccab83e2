"""One thread for every test: the models are tiny, and results must not depend on how many cores a machine has.

Signals mean what they mean in a terminal, also where the tests run in the background: there a shell has them ignored.
"""

import os
import signal

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)

import torch  # noqa: E402  (reads the variables above when it is imported)

torch.set_num_threads(1)
