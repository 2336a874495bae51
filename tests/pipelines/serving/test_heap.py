"""What a served process has loaded is left alone by the garbage collector."""

import subprocess
import sys

SCRIPT = """
import gc
import pipelines.serving.frontend
from pipelines.serving.heap import freeze_heap
loaded = len(gc.get_objects())
freeze_heap()
print(loaded, gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_a_collection_has_little_to_look_through():
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    loaded, frozen, left = map(int, run.stdout.split()[-3:])
    assert loaded > 100_000
    assert frozen > 0.9 * loaded
    assert left < 1000
