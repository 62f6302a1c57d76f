"""Write the README's figures from perf/results/: its tables between two markers, its charts beside the results.

The README shows only the first shape of each case, at which torch.compile is timed too. The result files hold the rest.
"""

import argparse

from ssdperf import charts, readme, results
from ssdperf.environment import ROOT

FOLDER = ROOT / "perf" / "results"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        runs = {file.stem: results.load(file) for file in sorted(FOLDER.glob("*.json"))}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    file = ROOT / "README.md"
    file.write_text(readme.with_section(file.read_text(), readme.section(runs)))
    for stem, run in runs.items():
        for name, svg in charts.charts(run, readme.headline(run)).items():
            (FOLDER / f"{stem}-{name}.svg").write_bytes(svg)
    count = len(charts.CHARTS) * len(runs)
    print(f"wrote README.md and {count} charts in {FOLDER.relative_to(ROOT)}, from {len(runs)} files")


if __name__ == "__main__":
    main()
