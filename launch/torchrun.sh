#!/usr/bin/env bash
# Trains a recipe with torchrun: on the GPUs of one machine, or by the same command on each machine of a cluster.
#   launch/torchrun.sh RECIPE run=runs/mine [key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh RECIPE run=/shared/mine      (NODE_RANK=1 on the other)
# Variables: NPROC (processes of a machine; the GPUs), NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500),
# MAX_RESTARTS (3: how often all processes start again from the last checkpoint when one of them dies), PYTHON.
set -euo pipefail
python=${PYTHON:-python}
[[ $# -gt 0 ]] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
if [[ " $* " != *" run="* ]]; then
    echo "torchrun.sh: name the run folder (run=FOLDER): a restarted process must find it again" >&2
    exit 2
fi
nodes=${NNODES:-1}
processes=${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
accelerator=$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')
if ((nodes == 1)); then
    where=(--standalone)
else
    where=(--nnodes="$nodes" --node-rank="${NODE_RANK:?}" --master-addr="${MASTER_ADDR:?}")
    where+=(--master-port="${MASTER_PORT:-29500}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
where+=(--nproc-per-node="$processes" --max-restarts="${MAX_RESTARTS:-3}")
exec "$python" -m torch.distributed.run "${where[@]}" -m anonfw fit "$@" \
    "trainer.num_nodes=$nodes" "trainer.devices=$processes" "trainer.accelerator=$accelerator"
