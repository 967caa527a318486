#!/usr/bin/env bash
# Run a stage of the GPU tests on this machine, without a network: bash gpu_bundle/run.sh STAGE [--cpu-rehearsal]
# STAGE is 1, 2, 3, 4, gpus, or te, which builds Transformer Engine's extension (docs/gpu.md). The report is gpu_bundle/report, or the folder after --out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if [ $# = 0 ]; then
    sed -n '2,3s/^# //p' "$here/run.sh" >&2
    exit 2
fi
for word in "$@"; do # of several stages the first that is none; options are checked by the tests' own command
    case $word in
        1 | 2 | 3 | 4 | gpus) ;;
        te) [ $# = 1 ] || {
            echo "error: stage te: it is built alone; use bash gpu_bundle/run.sh te, then the other stages" >&2
            exit 2
        } ;;
        -*) break ;;
        *)
            echo "error: stage $word: use 1, 2, 3, 4, gpus or te" >&2
            exit 2
            ;;
    esac
done
if ! command -v "$python" >/dev/null; then
    echo "error: PYTHON=$python: no such program; name the Python that has torch and pytest" >&2
    exit 2
fi
"$python" "$here/install.py"
[ "$1" = te ] && exec "$python" "$here/install.py" te
# Only this: what else the caller's PYTHONPATH held could be another version of the package.
export PYTHONPATH="$here/site:$here"
out=(--out "$here/report")
for word in "$@"; do [ "$word" = --out ] && out=(); done
exec "$python" -m tests.gpu.run "$@" "${out[@]}"
