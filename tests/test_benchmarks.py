import json
import subprocess
import sys

import keras
import pytest

from benchmarks.gpu import RIVALS, SERVED


@pytest.mark.long
def test_gpu(tmp_path):
    backend = keras.backend.backend()
    arguments = "--size tiny --rounds 1 --steps 1 --backend".split()
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *arguments, backend]
        + ["--output", tmp_path],
        check=True,
        timeout=900,
    )
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())
    assert {row["model"] for row in rows} == {"tiny", "tiny-gpt2"}
    found = {(row["model"], row["method"]): row for row in rows}
    assert all(row["peak"] > 0 and min(row["seconds"]) > 0 for row in rows)
    for ours, rivals in RIVALS.items():
        for rival in rivals:
            if ("tiny", rival) not in found:
                assert "PEFT" in rival and backend != "torch"
            elif "PEFT" in rival:
                sizes = {found["tiny", n]["parameters"] for n in (ours, rival)}
                assert len(sizes) == 1
    for method, ranks in SERVED.items():
        row = found.get(("tiny-gpt2", method))
        if row is not None:
            assert list(row["generate"]) == [str(rank or 8) for rank in ranks]
