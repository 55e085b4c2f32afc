#!/usr/bin/env bash
# Trains a recipe on this machine with all its GPUs (or NPROC processes), and again after a crash that is none of the
# program's own: killed by the kernel, a driver error.
#   launch/local.sh RECIPE run=runs/mine [key=value ...]
# Variables: NPROC (processes; the GPUs, else 1), MAX_RESTARTS (3), PYTHON.
set -euo pipefail
python=${PYTHON:-python}
[[ $# -gt 0 ]] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
processes=${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) - 1) / processes) + 1))}
for ((start = 0; ; start++)); do
    code=0
    "$python" -m anonfw fit "$@" "trainer.devices=$processes" || code=$?
    # 0: done. 1, 2: the program's own word. 75: asked to stop. 130: Ctrl-C. Above: killed by a signal.
    if ((code <= 130 || start >= ${MAX_RESTARTS:-3})); then exit "$code"; fi
    echo "local.sh: killed (exit code $code); starting again from the last checkpoint" >&2
done
