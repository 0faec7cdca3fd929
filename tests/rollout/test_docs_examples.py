"""The examples of docs/sdk.md and docs/rollout.md run as they stand, page by page, against the real services."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            "sdk.md",
            [
                r"turn 0: \d+ tokens, \d+% cached",
                r"Report\(prompt=\d+, cached=\d+, computed=\d+, ideal=\d+, miss=",
                r"Delta\(",
            ],
        ),
        ("rollout.md", [r"0/train-0-0 \[", r"(?m)^3 3 [\d.]+ "]),
    ],
)
def test_examples_run(
    page: str, expected: list[str], engine_url: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]
):
    text = (DOCS / page).read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    code = code.replace("http://127.0.0.1:8000", engine_url).replace("http://127.0.0.1:8900", sandbox_url)
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), namespace)
    output = capsys.readouterr().out
    for pattern in expected:
        assert re.search(pattern, output), output
    for name in ("agent", "client"):
        if name in namespace:
            namespace[name].close()
