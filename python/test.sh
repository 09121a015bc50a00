#!/usr/bin/env bash
# Builds the wheel, installs it in a virtual environment of its own, and runs the tests of the
# package.
#   python/test.sh FOLDER      the environment and the wheel go to FOLDER, and are used again there
#
# DFAR_FUZZ=10000    calls of the fuzz test (default 300)
# DFAR_PROFILE=dev   cargo profile of the wheel and the commands (default release)
# DFAR_TORCH=0       does not install PyTorch (0.5 GB, with CUDA's libraries 3 GB to download)
set -euo pipefail
cd "$(dirname "$0")"
folder=$(realpath -m "${1:?usage: python/test.sh FOLDER}")
profile=${DFAR_PROFILE:-release}
target=$(realpath -m "${CARGO_TARGET_DIR:-../target}")
bin=$target/$([ "$profile" = dev ] && echo debug || echo "$profile")
python=$folder/venv/bin/python

say() { printf -- '-- %s (%s s)\n' "$1" "$SECONDS"; }

mkdir -p "$folder"
[ -x "$python" ] || python3 -m venv "$folder/venv"
say "packages"
needed=(maturin numpy pytest)
# Without one of these, its tests are skipped, by name.
optional=(hypothesis pyarrow pandas polars fastapi uvicorn httpx nbclient nbformat ipykernel
    tensorboardX tqdm mypy)
if ! "$python" -m pip install --quiet "${needed[@]}" "${optional[@]}" 2>/dev/null; then
    "$python" -m pip install --quiet "${needed[@]}"
    for package in "${optional[@]}"; do
        "$python" -m pip install --quiet "$package" 2>/dev/null ||
            echo "SKIPPED: $package cannot be installed"
    done
fi
if [ "${DFAR_TORCH:-1}" = 0 ]; then
    echo "SKIPPED: torch, because DFAR_TORCH=0"
elif ! "$python" -c 'import torch' 2>/dev/null; then
    # PyPI's wheel; for Linux on x86 it comes with CUDA's libraries.
    "$python" -m pip install --quiet --no-cache-dir torch 2>/dev/null || echo "SKIPPED: torch cannot be installed"
fi

say "wheel, $profile profile"
rm -f "$folder"/wheels/*.whl
"$folder/venv/bin/maturin" build --quiet --locked --profile "$profile" --interpreter "$python" \
    --out "$folder/wheels"
# With the same features as the wheel, so that they share its dependencies. The tests compare with
# them.
cargo build --quiet --locked --profile "$profile" -p dfar -p dfar-python --bin dfar-train --bin dfar-data
wheel=$(ls "$folder"/wheels/*.whl)
size=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $size bytes"
# The limits of size and import time are those of a release.
[ "$profile" != release ] || [ "$size" -lt 15000000 ] || { echo "the wheel is larger than 15 MB"; exit 1; }
"$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"

say "import time"
# From an empty folder, without Rust on the PATH. The best of 5: the first reads the file from disk.
(cd "$folder" && PATH=/usr/bin:/bin "$python" - <<'PYTHON'
import subprocess, sys
program = "import time; t = time.perf_counter(); import dfar; print(time.perf_counter() - t)"
best = min(float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(5))
print(f"import dfar: {1e3 * best:.1f} ms")
sys.exit(best > 0.05)
PYTHON
) || [ "$profile" != release ] || { echo "importing dfar takes more than 50 ms"; exit 1; }

if "$python" -c 'import mypy, torch' 2>/dev/null; then
    say "types"
    "$python" -m mypy --config-file pyproject.toml --cache-dir "$folder/mypy"
fi

say "tests"
# From another folder: here, `import dfar` finds the sources without the extension module.
tests=$PWD/tests
(cd "$folder" && DFAR_BIN=$bin "$python" -m pytest -p no:cacheprovider -rs "$tests")
say "done"
