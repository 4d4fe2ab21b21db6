#!/usr/bin/env bash
# Builds the wheel, installs it beside the environment's dependencies in a scratch folder, and imports
# and starts it from there, so that a module or data file missing from the wheel is found.
set -euo pipefail
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m build --wheel --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 \
    || { cat "$scratch/build.log" >&2; exit 1; }
"$python" -m venv --system-site-packages "$scratch/venv"
# The scratch environment sees the development environment's dependencies but not its editable expunge.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$scratch"/dist/*.whl
cd "$scratch"
PYTHONPATH="$site" "$scratch/venv/bin/python" -P - <<'PY'
import pathlib
import sys

sys.path = [p for p in sys.path if not p.endswith("/src")]
import expunge
from expunge import AdaptiveRMU, evaluate, unlearn

where = pathlib.Path(expunge.__file__)
assert "site-packages" in str(where) and "venv" in str(where), f"imported the checkout: {where}"
print(f"wheel: expunge {expunge.__version__} installed and imported, {AdaptiveRMU.__name__} found")
PY
PYTHONPATH="$site" "$scratch/venv/bin/expunge" --help >/dev/null
