#!/usr/bin/env bash
# Builds or loads the CUDA library for the GPU that is here, checks the operator and the detectors on it and measures them,
# within minutes (6 unless --minutes says otherwise): tools/gpu_check.sh [--help]
# PYTHON names another interpreter than python3. A folder .gpu/site in the checkout is taken for packages that this
# Python lacks (Detectron2 where there is no network), .gpu/_ms_deform_attn_cuda.abi3.so for a library built elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
site=$PWD/.gpu/site
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$site" ]; then PYTHONPATH="$PYTHONPATH:$site"; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
python=${PYTHON:-python3}
"$python" -c 'import detectron2' 2> /dev/null || {
  echo "gpu_check: $python has no Detectron2: run tools/install_detectron2.py, or carry it along in .gpu/site" >&2
  exit 1
}
exec "$python" -m detr_family.benchmarks.gpu_check "$@"
