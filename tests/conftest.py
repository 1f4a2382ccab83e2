"""One thread for every test: the models are tiny, and results must not depend on how many cores a machine has."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402  (reads the variables above when it is imported)

torch.set_num_threads(1)
