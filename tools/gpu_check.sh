#!/usr/bin/env bash
# Builds the CUDA library for the GPU that is here, checks the operator on it and measures it, in one command:
#   tools/gpu_check.sh [rounds of the random check, 12 unless given]
# PYTHON names another interpreter than python3. Ends with 1 where something differs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rounds=${1:-12}
status=0
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || {
  echo "gpu_check: torch sees no CUDA device" >&2
  exit 1
}
echo "== build for $arch"
FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} "$python" setup.py -q build_ext --inplace || exit 1
"$python" -m detr_family.collect_env
if command -v cuobjdump > /dev/null; then
  echo "== registers and stack of the kernels for D = 32"
  cuobjdump --dump-resource-usage detr_family/layers/_ms_deform_attn_cuda*.so 2> /dev/null |
    grep -A1 -E "Function .*Lb1E" | grep -oE "(forward|backward)_kernel[A-Za-z0-9_]*|REG:[0-9]+ STACK:[0-9]+" | paste - - |
    sed 's/IN11detr_family6ConfigI/ /'
fi
echo "== tests marked gpu"
if "$python" -m pytest --version > /dev/null 2>&1; then
  "$python" -m pytest -q -m gpu tests || status=1
else
  echo "pytest is not installed: skipped"
fi
echo "== against float64 on the CPU, fresh random inputs"
"$python" -m detr_family.benchmarks.deformable_attention --device cuda --check "$rounds" || status=1
for dtype in float32 bfloat16 float16; do
  echo "== speed, $dtype"
  "$python" -m detr_family.benchmarks.deformable_attention --device cuda --dtype "$dtype" || status=1
done
exit $status
