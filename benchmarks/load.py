"""How long the embedded model takes to load from the cache, in a new process each time.

python benchmarks/load.py [TIMES]     # 5 by default; imports are not counted
"""

from __future__ import annotations

import statistics
import subprocess
import sys

LOAD = """
import time
from tokenworks.core.models import load
begun = time.perf_counter()
load("smollm2-135m")
print(time.perf_counter() - begun)
"""
AIM = 3.0
"""Seconds that the project set out to stay under."""


def main(times: int = 5) -> None:
    runs = [subprocess.run([sys.executable, "-c", LOAD], capture_output=True, check=True) for _ in range(times)]
    seconds = [float(run.stdout.split()[-1]) for run in runs]
    slowest = max(seconds)
    print(
        f"smollm2-135m: median {statistics.median(seconds):.2f} s, slowest {slowest:.2f} s, aim {AIM:g} s: "
        f"{'reached' if slowest < AIM else 'not reached'}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
