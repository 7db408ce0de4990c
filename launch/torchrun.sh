#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
  cat <<'HELP'
usage: launch/torchrun.sh CONFIG [OVERLAY.yaml ...] [section.key=value ...]

Train as CONFIG says on the GPUs of this machine, or together with others. Run it on every node; the variables:

  NPROC_PER_NODE  processes here; default: one a GPU, without GPUs what parallel.* needs for one model
  NNODES          number of nodes                             (default: 1)
  NODE_RANK       this node, 0 .. NNODES-1                    (needed if NNODES > 1)
  MASTER_ADDR     name or address of node 0                   (needed if NNODES > 1)
  MASTER_PORT     port of node 0 at which the nodes meet      (default: 29500)
  RDZV_ID         name of the job, the same on every node     (default: lora-megatron)
  RDZV_TIMEOUT    seconds to wait for the other nodes         (default: 600)
  MAX_RESTARTS    restarts after a crash or a lost rank       (default: 0); the run resumes by itself
  LOCAL_ADDR      address of this node for the others         (default: what its name resolves to)
  COMMAND         train, bench, evaluate or generate; options last   (default: train)
  PYTHON          interpreter   (default: the active environment's, else .venv/bin/python, else python3)
  OMP_NUM_THREADS threads a process                           (default: cores / processes, at most 16)

SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 go to the processes: they save, and the run is continued by the same command
with run.resume=auto. Exit status: that of the processes, 0 done, 2 configuration, 3 data, 4 checkpoint or disk,
5 numerical, 6 hang or lost rank, 75 preempted; 128 + N for one killed by signal N.

examples:
  launch/torchrun.sh launch/configs/tiny.yaml parallel.tensor=2
  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh config.yaml run.resume=auto     # on the first node
  COMMAND=bench launch/torchrun.sh config.yaml parallel.tensor=2 --methods lora,full
HELP
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  '') fail "no CONFIG given: launch/torchrun.sh CONFIG [section.key=value ...], or --help" ;;
esac
[[ -r $1 && -f $1 ]] || fail "cannot read configuration $1"

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $root/.venv/bin/python ]]; then
    PYTHON=$root/.venv/bin/python
  fi
fi
command -v "$PYTHON" >/dev/null || fail "no interpreter $PYTHON: set PYTHON to one that has lora_megatron"
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "lora_megatron"))))' ||
  fail "$PYTHON has no torch or no lora_megatron: run 'make install', or set PYTHON to one that has both"

# The agent speaks for itself in one line where torch's client of the rendezvous prints fifty; workers keep theirs.
if [[ -z ${TORCH_CPP_LOG_LEVEL:-} ]]; then
  export TORCH_CPP_LOG_LEVEL=FATAL LORA_MEGATRON_QUIET_AGENT=1
fi
exec "$PYTHON" -m lora_megatron.commands.launch "${COMMAND:-train}" "$@"
