"""Freed memory stays where it is asked to, and goes back when it is asked to."""

import ctypes
import subprocess
import sys

import pytest


MEASURED = """
from pathlib import Path
from training.malloc import keep_freed_memory, return_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

def take_and_free():
    blocks = [bytearray(b"x" * 2**20) for _ in range(200)]
    return len(blocks)

before = resident()
take_and_free()
print(resident() - before)
keep_freed_memory()
take_and_free()
print(resident() - before)
return_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_returned():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    at_first, kept, returned = map(int, done.stdout.split())  # MiB
    assert at_first < 50 and kept > 150 and returned < 50
