"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that they write
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_names_every_op() -> None:
    from ssdcore import kernels

    assert all(name in README for name in set(kernels.__all__) - {"Detections", "MultiBoxLosses"})


@pytest.mark.parametrize(
    ("row", "folder", "launches"),
    [
        ("`box_iou`, `encode_boxes`, `decode_boxes` | 1 ", "boxes", 4),
        ("`match_anchors` | 2 |", "matching", 2),
        ("`multibox_loss` | 3 forward, 1 backward", "multibox", 4),
        ("`batched_nms_padded` | 2, a fill", "nms", 2),
        ("`postprocess_detections` | 4 |", "postprocess", 4),
    ],
)
def test_the_table_of_launches_is_right(row: str, folder: str, launches: int) -> None:
    assert row in README
    source = (ROOT / f"kernels/{folder}/triton.py").read_text()
    assert len(re.findall(r"_kernel\[", source)) == launches
