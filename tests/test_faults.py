"""The fault campaign in short (bench/faults.py): a few kills, then each other fault once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def campaign(root, tmp_path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(root / "bench" / "faults.py"), *arguments, "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.slow
def test_kills_at_random_moments(root, tmp_path):
    recipe = str(root / "recipes" / "identity_mapper.yaml")  # the quickest to start
    (row,) = campaign(root, tmp_path, "--only", "kills", "--kills", "8", "--seed", "1", "--recipe", recipe)
    assert row["ok"] and "8 times" in row["fault"]


@pytest.mark.slow
def test_other_faults(root, tmp_path):
    names = ["full_disk", "read_only", "clock", "vanishes", "changes", "worker", "nan"]
    rows = campaign(root, tmp_path, "--only", *names)
    assert [row["ok"] for row in rows] == [True] * len(names)
