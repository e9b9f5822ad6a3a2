#!/usr/bin/env bash
# The GPU tests, then benchmarks/gpu.py; arguments go to the latter (--quick). Neither needs a network, Ray, MLflow or the Hub.
#
#     bash benchmarks/gpu.sh
#
# PYTHON names the interpreter. The last line is one JSON object, also where tests fail.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
# most of the tests' time goes into compiling kernels on the CPU
workers=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 6")
TORCHINDUCTOR_COMPILE_THREADS=4 timeout "${TESTS_SECONDS:-150}" \
  "$PYTHON" -m pytest -m gpu $workers -p no:cacheprovider -rA --durations=5 tests/test_gpu.py
exec "$PYTHON" -m benchmarks.gpu --tests $? "$@"
