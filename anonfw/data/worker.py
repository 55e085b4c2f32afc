"""A decoding process: `python -m anonfw.data.worker`, started by `anonfw.data.ring` and by nothing else.

It reads slot numbers from its standard input, does the slot's jobs in the shared ring and answers with the number.
It ends when its input ends, thus also when its parent is killed.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys

import numpy as np

from anonfw.data.decode import Tars, decode
from anonfw.data.ring_layout import Layout, map_ring

NUMBER = struct.Struct("<i")


def main() -> None:
    # Ctrl-C and what a cluster sends before a time limit reach every process of a run: the parent decides what ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.fileno()
    line = requests.readline()
    if not line:  # the parent is gone already
        return
    order = json.loads(line)
    layout = Layout(**order["layout"])
    ring = map_ring(order["descriptor"], layout)
    tars = Tars(order["tars"])
    while True:
        message = requests.read(NUMBER.size)
        if len(message) < NUMBER.size:
            return
        (slot,) = NUMBER.unpack(message)
        jobs, status, pixels = layout.views(ring, slot)
        rows = int(np.count_nonzero(jobs[:, -1] >= 0))
        decode(jobs[:rows], status[:rows], pixels, tars)
        try:
            os.write(answers, message)
        except BrokenPipeError:  # nobody waits for the answer any more
            return


if __name__ == "__main__":
    main()
