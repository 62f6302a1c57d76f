"""The state of a run on disk, from which it can be resumed: `last.pt`, and the ones before it as `last-1.pt`, ..."""

import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssdcore.train.config import differences
from ssdcore.weights import write_atomically

NAME = "last"
FIELDS = frozenset(
    {"model", "optimizer", "average", "scaler", "trained", "settings", "history", "step", "part", "logged"}
)  # see `_Run.state` in `ssdcore.train.loop`


def state_files(folder: Path) -> list[Path]:
    """The states in `folder`, the newest first."""
    older = {path: path.stem.removeprefix(f"{NAME}-") for path in folder.glob(f"{NAME}-*.pt")}
    numbered = sorted((int(number), path) for path, number in older.items() if number.isdigit())
    newest = folder / f"{NAME}.pt"
    return ([newest] if newest.exists() else []) + [path for _, path in numbered]


def write_state(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write `last.pt`, and keep `keep - 1` of the states before it.

    At every moment `last.pt` is a whole file, the old one or the new one. If the disk is full, all states stay as they
    are.

    Raises:
        OSError: the file cannot be written. The message says what remains.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    newest = folder / f"{NAME}.pt"
    new = folder / f"{NAME}.new"
    try:
        write_atomically(new, buffer.getvalue())
    except OSError as error:
        left = f"{newest} remains, to resume from" if newest.exists() else "no state has been written yet"
        raise OSError(f"cannot write the state of the run, {buffer.tell():,} bytes: {error}; {left}") from error
    for path in state_files(folder)[max(1, keep - 1) :]:
        path.unlink()
    for number in range(keep - 1, 1, -1):
        older = folder / f"{NAME}-{number - 1}.pt"
        if older.exists():
            os.replace(older, folder / f"{NAME}-{number}.pt")
    if keep > 1 and newest.exists():
        _give_second_name(newest, folder / f"{NAME}-1.pt")
    os.replace(new, newest)


def read_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the newest state that is whole. Damaged ones that are newer get the suffix ".damaged".

    Args:
        folder: of the run.
        settings: those of the run that continues. The state's must be the same.

    Raises:
        ValueError: there is no state, none is whole, or the run had other settings.
    """
    paths = state_files(folder)
    if not paths:
        raise ValueError(f"nothing to resume: {folder / f'{NAME}.pt'} does not exist")
    for position, path in enumerate(paths):
        try:
            state = _load(path)
        except ValueError as error:
            if position + 1 == len(paths):
                raise
            path.rename(path.with_suffix(".damaged"))  # so that it does not become one of the kept states
            print(f"{error}; resuming from {paths[position + 1].name} instead")
            continue
        changed = differences(state["settings"], settings)
        if changed:
            listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
            raise ValueError(f"{path} is the state of a run with other settings: {listed}")
        return state
    raise AssertionError


def _load(path: Path) -> dict[str, Any]:
    """Read one state. Raises ValueError, whose message is one line, unless it is whole and of this program."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is not the state of a run, or only a part of one: {error}") from error
    if broken is not None:
        raise ValueError(f"{path} is not the state of a run any more: {broken} in it is damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types of exception, with a page of advice
        raise ValueError(f"{path} is not the state of a run: it has other objects than tensors and numbers") from error
    if not isinstance(state, dict) or not state.keys() >= FIELDS:
        older = isinstance(state, dict) and "history" in state
        raise ValueError(f"{path} is not the state of a run" + (" of this version of ssdcore" if older else ""))
    return state


def _give_second_name(path: Path, second: Path) -> None:
    """Let `second` be the same file as `path`, or a copy where the file system has no links."""
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        shutil.copyfile(path, second)
