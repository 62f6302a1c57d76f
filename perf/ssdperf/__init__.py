"""The code that the scripts of perf/ share: problems, measurements, results and what is made of them."""

import os

# Here, because torch reads these once, when the first module of the package imports it: its profiler logs a lot.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
