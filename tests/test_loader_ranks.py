"""FaceLoader under torch.distributed: two real processes share the global batches of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_dataset as tiny

from anonfw.data.loader import FaceLoader

RANK = """
import json, sys
import torch.distributed as distributed
from anonfw.data.loader import FaceLoader

folder, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
loader = FaceLoader(folder, "train", 3, mode="pairs", flip=0.5, workers=rank)
keys = [batch.key for _ in range(2) for batch in loader]
print(json.dumps([loader.place(), len(loader), loader.state_dict(), keys]))
loader.close()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(root: Path, tmp_path: Path):
    folder = tiny.write(tmp_path / "tiny", 17, 5, [3, 1, 4, 2], 8)
    command = [sys.executable, "-c", RANK, str(folder), str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=root) for rank in range(2)]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    alone = FaceLoader(folder, "train", 6, mode="pairs", flip=0.5, workers=0)
    expected = [batch.key for _ in range(2) for batch in alone]
    assert [place for place, *_ in results] == [[0, 2], [1, 2]]
    assert {length for _, length, *_ in results} == {len(alone)}
    assert [state for *_, state, _ in results] == [alone.state_dict()] * 2
    first, second = (keys for *_, keys in results)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(keys) for keys in expected]
    assert first[0] == expected[0][::2] and second[0] == expected[0][1::2]  # interleaved
