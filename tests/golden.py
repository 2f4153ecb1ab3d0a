"""Golden files: what must not change by accident, kept as JSON under ``tests/goldens``.

After a change that is meant, write them anew and read the difference before it is committed:

    VLP_REGENERATE_GOLDENS=1 python -m pytest tests -q -k golden
    git diff tests/goldens
"""

import json
import os
import pathlib
from typing import Any

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent / "goldens"


def check_golden(name: str, value: dict[str, Any]) -> None:
    """Compare a flat dict with ``goldens/NAME.json``, or write that file where asked to.

    Args:
        name: of the file, without ending.
        value: key -> anything that JSON holds.
    """
    file = FOLDER / f"{name}.json"
    value = json.loads(json.dumps(value))  # tuples become lists, as in the file
    if os.environ.get("VLP_REGENERATE_GOLDENS"):
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value[key])}" for key in value)
        file.write_text(f"{{\n{rows}\n}}\n")
        pytest.skip(f"wrote {file.name}")
    hint = "If the change is meant: VLP_REGENERATE_GOLDENS=1 python -m pytest tests -q -k golden"
    assert file.exists(), f"{file.name} does not exist. {hint}"
    golden = json.loads(file.read_text())
    changes = [
        f"{key}: {golden.get(key, 'absent')} -> {value.get(key, 'absent')}"
        for key in sorted({*golden, *value})
        if key not in golden or key not in value or golden[key] != value[key]
    ]
    assert not changes, "\n".join([f"{file.name} differs:", *changes, hint])
    assert list(golden) == list(value), f"{file.name}: same entries in another order. {hint}"
