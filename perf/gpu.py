"""Check, time, test and train ssdcore on a machine with a GPU that is lent for a short time, without a network.

Each stage ends by itself within --minutes and leaves its files in one folder. Called again, a stage continues: it does
only what is missing. The most valuable stage comes first: check, bench, test, train.

exit status: 0 if the stage is finished, 1 if something failed, 75 if the stage must be called again to be finished.

environment variables:
  PYTHON           the interpreter (default: python3)
  WHEELS           a folder of wheels that are installed first, for packages that the machine does not have
  SSDCORE_COMMIT   names the commit where git's history was not copied along
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from ssdperf import stages
from ssdperf.environment import ROOT
from ssdperf.progress import UNFINISHED

OUTPUT = ROOT / "perf" / "gpu-results"


def arguments_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: run the stage on small problems, to show that it works (default: %(default)s)",
    )
    shared.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="folder for the files of all stages, which a stage that continues needs (default: perf/gpu-results)",
    )
    shared.add_argument("--minutes", type=float, default=9.0, help="the stage ends by then (default: %(default)s)")

    parser = argparse.ArgumentParser(
        prog="perf/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE", title="stages")
    for name, text in (
        ("check", "every op once at full size against eager, the kernels that may hang first"),
        ("bench", "perf/run.py, headlines first; refuses to continue results of another commit, code or device"),
        ("test", "the whole test suite, in parallel where pytest-xdist is installed"),
    ):
        commands.add_parser(name, help=text, description=text, parents=[shared])
    text = "train ssd300_vgg16 on a dataset and evaluate it"
    command = commands.add_parser("train", help=text, description=text, parents=[shared])
    command.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="DATA",
        help="folder in the form of Pascal VOC or COCO; on a CPU by default a small set that is drawn for the purpose",
    )
    command.add_argument("--split", default="test", help="the split to evaluate on (default: %(default)s)")
    return parser


def main() -> int:
    started = time.monotonic()
    parser = arguments_parser()
    if len(sys.argv) == 1:
        parser.print_help()
        return 2
    arguments = parser.parse_args()
    if arguments.stage == "train" and arguments.data is None and arguments.device == "cuda":
        parser.error("train needs DATA, a folder in the form of Pascal VOC or COCO")
    stages.require_packages(arguments.stage)
    stages.require_device(arguments.device)
    # A shell that starts this script in the background makes it ignore SIGINT, and the commands of the stages with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with stages.importable_checkout() as checkout:
        sys.path.insert(0, str(checkout))
        job = stages.Job(arguments.device, output, started, 60 * arguments.minutes, checkout)
        if arguments.stage == "train":
            report = stages.train(job, arguments.data and arguments.data.resolve(), arguments.split)
        else:
            report = getattr(stages, arguments.stage)(job)
    if report.status == UNFINISHED:
        following = f"next: perf/gpu.sh {arguments.stage} again, which continues"
    elif report.status:
        following = f"next: perf/gpu.sh {arguments.stage} again, which repeats what failed"
    else:
        following = stages.FOLLOWING[arguments.stage]
    print(f"{arguments.stage}: {report.text}; {following}")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
