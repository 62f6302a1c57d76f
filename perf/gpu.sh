#!/usr/bin/env bash
# Checks, times, tests and trains ssdcore on a machine with a GPU, in stages. Without arguments it prints its usage;
# perf/gpu.py does the work.
set -euo pipefail
python=${PYTHON:-python3}
unset TRITON_INTERPRET # the stages decide where the kernels run
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
exec "$python" "$(dirname "$0")/gpu.py" "$@"
