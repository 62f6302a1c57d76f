#!/usr/bin/env bash
# On a machine with a GPU, torch and triton, and no network: install in place, run the tests on the GPU (the kernels
# compiled, at full size), then the benchmarks, with perf/run.py's arguments. Leaves perf/results/<gpu>.json, which holds
# every case done so far if it is stopped. Exits as the tests did. WHEELS=folder installs the wheels in it first: pycocotools,
# safetensors and tensorboard, without which some tests cannot be loaded, or a peer. Where the repository's history was not
# copied along, SSDCORE_COMMIT names the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
unset TRITON_INTERPRET
[ -z "${WHEELS:-}" ] || "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
"$python" - <<'EOF'
import importlib.util, sys
needed = ("torch", "triton", "numpy", "torchvision", "PIL", "tqdm", "matplotlib", "pytest", "hypothesis")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"perf/gpu.sh needs {', '.join(missing)}, which this Python has not: {sys.executable}")
import torch
if not torch.cuda.is_available():
    sys.exit("perf/gpu.sh needs a GPU: torch.cuda.is_available() is False")
EOF
"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
status=0
"$python" -m pytest -q --durations=5 tests || status=$?
"$python" perf/run.py "$@"
[ "$status" = 0 ] || echo "the tests failed (pytest exited with $status): do not quote these figures" >&2
exit "$status"
