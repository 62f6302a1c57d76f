"""Write the figures of both READMEs from perf/results/: tables between two markers, charts beside the results.

They show only the first shape of each case, for each model and each kind of head outputs. Several files of one device
are repetitions: the first file without a busy core is shown, and a table shows how far the figures of all files spread.
The result files hold the rest.
"""

import argparse

from ssdperf import charts, readme, results, spread
from ssdperf.environment import ROOT

FOLDER = ROOT / "perf" / "results"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        runs = {file.stem: results.load(file) for file in sorted(FOLDER.glob("*.json"))}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for file, text in ((ROOT / "README.md", readme.section(runs)), (ROOT / "perf/README.md", readme.details(runs))):
        file.write_text(readme.with_section(file.read_text(), text))
    shown = spread.first_runs(runs)
    for stem, run in shown.items():
        for name, svg in charts.charts(run, readme.headline(run)).items():
            (FOLDER / f"{stem}-{name}.svg").write_bytes(svg)
    count = len(charts.CHARTS) * len(shown)
    print(f"wrote README.md, perf/README.md and {count} charts in {FOLDER.relative_to(ROOT)}, from {len(runs)} files")


if __name__ == "__main__":
    main()
