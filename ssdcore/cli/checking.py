"""`ssdcore data check`."""

from pathlib import Path
from typing import Annotated

import typer

from ssdcore.cli.options import option, require_model


def check_data(
    data: Annotated[Path, typer.Argument(help="Dataset folder.")],
    model: Annotated[str, typer.Option(help="Model whose anchors are compared with the objects.")] = "ssd300_tiny",
    output: Annotated[
        Path | None, option("Folder for the picture ground-truth.png. Default: runs/DATASET-check.")
    ] = None,
) -> None:
    """List everything that is wrong with a dataset, count what it holds, and draw some images with their ground truth.

    The exit code is 0 if nothing is wrong, and 1 otherwise.
    """
    import torch

    from ssdcore.data.check import check_dataset, describe, draw_sheet
    from ssdcore.models import MODELS

    require_model(model)
    with torch.device("meta"):
        config = MODELS[model](2).anchor_config
    report = check_dataset(data)
    print(describe(report, model, config))
    sheet = draw_sheet(report.datasets)
    if sheet is not None:
        path = (output or Path("runs") / f"{data.resolve().name}-check") / "ground-truth.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"\nwrote {path}, a picture of some images with their ground truth")
    if report.problems:
        raise typer.Exit(1)
