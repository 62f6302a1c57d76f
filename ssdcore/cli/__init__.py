"""The command line: `ssdcore demo | train | evaluate | detect | export | models | convert | data check`.

Each command has a file and is also a Python function.

Modules that import torch are imported inside the functions that need them, so that `ssdcore --help` answers at once.
"""

import sys
from importlib.util import find_spec
from io import TextIOWrapper

EXTRA = ("matplotlib", "PIL", "pycocotools", "safetensors", "tensorboard", "torchvision", "tqdm", "typer", "yaml")
if missing := [name for name in EXTRA if find_spec(name) is None]:
    raise SystemExit(f"ssdcore's commands need {', '.join(missing)}: pip install 'ssdcore[train]'")

import typer  # noqa: E402

from ssdcore.cli.checking import check_data  # noqa: E402
from ssdcore.cli.converting import convert  # noqa: E402
from ssdcore.cli.demonstrating import demo  # noqa: E402
from ssdcore.cli.detecting import detect  # noqa: E402
from ssdcore.cli.evaluating import evaluate  # noqa: E402
from ssdcore.cli.exporting import export  # noqa: E402
from ssdcore.cli.listing import models  # noqa: E402
from ssdcore.cli.training import train  # noqa: E402

app = typer.Typer(
    name="ssdcore",
    help="Train, evaluate and run SSD object detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
for command in (demo, train, evaluate, detect, export, models, convert):
    app.command()(command)
data_app.command("check")(check_data)


def main() -> None:
    """Run the command line. Errors that the user can correct are printed as one line, without a traceback."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        # The message of an error from a worker process is a traceback, whose last line is the original error.
        message = str(error).strip()
        sys.exit(f"error: {message.splitlines()[-1] if message.startswith('Caught ') else message}")
