"""The examples of docs/masks.md run, print what they say, and its pictures are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paddle_flashmask import masks

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "masks.md"


def test_examples(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 15
    names: dict[str, object] = {}
    for block in blocks:
        if "flashmask_attention(" not in block:  # the call has its own tests, and needs the built op
            exec(compile(block, str(GUIDE), "exec"), names)
        promised = [line.removeprefix("#> ") for line in block.splitlines() if line.startswith("#> ")]
        assert capsys.readouterr().out.splitlines() == promised
    assert (tmp_path / "mask.png").exists()


def test_every_builder_has_its_picture_and_example():
    text = GUIDE.read_text()
    builders = set(masks.__all__) - {
        *("BlockStats", "TileClass", "TileCounts", "block_classes", "block_stats"),
        *("from_dense", "to_dense", "validate", "window_indices"),
    }
    assert len(builders) == 13
    for name in builders:
        assert f"`{name}(" in text
        assert f"masks.{name}(" in text
        assert (GUIDE.parent / "images" / f"mask_{name}.png").exists()
    for image in re.findall(r"\]\((images/.*?)\)", text):
        assert (GUIDE.parent / image).stat().st_size < 60_000
