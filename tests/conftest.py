"""One thread a process: the tests run side by side. Tests about threads set their own number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
