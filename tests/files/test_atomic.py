"""JSON that people read too."""

import json
from pathlib import Path

from emp_llm.files.atomic import write_json

CONTENT = {
    "shape": [4096, 11008],
    "empty": [],
    "words": ["a", "[\n  1\n]", "1,\n2"],
    "nested": [[1, -2.5e-7], {"counts": [0, 3, 1e20]}],
    "mixed": [1, None],
    "β": "schön",
}


def test_numbers_stand_on_one_line_and_everything_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, CONTENT)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == CONTENT
    assert '  "shape": [4096, 11008],\n' in text
    assert '"counts": [0, 3, 1e+20]\n' in text
    assert "    [1, -2.5e-07],\n" in text
    assert '  "β": "schön"\n}\n' in text
