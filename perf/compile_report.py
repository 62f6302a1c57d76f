"""Compile every kernel at its production configuration, for GPUs that need not be there.

The launchers run on CPU tensors, and their launches are recorded instead of made. So this compiles exactly what the
launchers launch: the same kernels, block sizes, warps, dtypes and specialisations. It also compiles the smallest
problems, for which Triton specialises the kernels differently.

From the machine code it prints the registers and spilled bytes per thread, the shared memory per program, and the
number of instructions: all of them, the loads and stores of global memory, how many of these are 16 bytes wide, and the
barriers. A change to a kernel therefore shows without a GPU. Exits with 1 if a kernel spills.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")

from tqdm import tqdm

from ssdcore.cores import usable_cores
from ssdperf.compilation import report
from ssdperf.text import text_table

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100 and H200, B200, MI300
COLUMNS = ("registers", "spilled", "shared", "instructions", "loads", "stores", "wide", "barriers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--json", action="store_true", help="print the rows of all problems as JSON instead")
    arguments = parser.parse_args()
    for architecture in arguments.arch:
        if not re.fullmatch(r"sm_\d+|gfx\w+", architecture):
            parser.error(f"--arch takes names such as sm_90 or gfx942, got {architecture}")

    with ProcessPoolExecutor(min(len(arguments.arch), usable_cores())) as pool:
        reports = tqdm(pool.map(report, arguments.arch), total=len(arguments.arch), unit="arch", disable=None)
        rows = [row for rows in reports for row in rows]
    spilling = sorted({row["kernel"] for row in rows if row["spilled"]})
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        shown = [row for row in rows if row["problem"] == "production"]
        header = ("kernel", "arch", "dtypes", "head", "warps", *COLUMNS)
        print(text_table(header, [[str(row[name]) for name in header] for row in shown]))
        print(f"{len(rows)} kernels compiled; spilling: {', '.join(spilling) or 'none'}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
