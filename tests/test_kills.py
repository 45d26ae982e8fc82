"""A kill leaves the old file or the new one."""

import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.test_damaged_files import enabled

KILLS = int(os.environ.get("KILLS", 2))  # of each writer
WRITERS = {
    "keras": "model.save(path + '.keras')",
    "adapter": "kd.save_adapter(model, path)",
    "peft": "kd.to_peft(model, path)",
}
WRITES = """
import sys
import numpy as np
import keras_dylora as kd
from tests.test_damaged_files import enabled

path = sys.argv[1]
model = enabled()
number = 0
while True:
    number += 1
    for layer in model.dylora_layers:
        layer.up.assign(np.full(layer.up.shape, float(number)))
    {write}
    print(number, flush=True)
"""


def stored(kind, path):
    if kind == "keras":
        return keras.saving.load_model(f"{path}.keras")
    model = enabled()
    load = kd.load_adapter if kind == "adapter" else kd.from_peft
    return load(model, path)


@pytest.mark.long
@pytest.mark.parametrize("kind", WRITERS)
def test_a_kill_loses_nothing(kind, tmp_path):
    """Kills at moments of their own, each after some whole writes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "written"
    code = WRITES.format(write=WRITERS[kind])
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ,
        )
        whole = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        whole = int(rest[-1]) if rest else whole
        found = backend.to_numpy(stored(kind, path).dylora_layers[0].up)
        assert np.ptp(found) == 0 and found[0, 0] in (whole, whole + 1)
