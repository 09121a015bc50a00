#!/usr/bin/env bash
# Times dfar beside PyTorch, JAX, candle, pandas and polars on this machine's CPU.
#   benches/peers/cpu.sh OUT              everything; again to continue after a stop
#   benches/peers/cpu.sh OUT --quick      tiny sizes, to see that everything works
#   benches/peers/cpu.sh OUT --only attention|training|systems|import|check
# OUT gets rows.jsonl, table.md, plots, golden.txt (results on the golden cases) and
# environment.json. A complete run is also filed in benches/results/MACHINE. README.md explains the
# rows.
#
# PYTHON=python3.13         the Python of the environment, 3.11 or newer (default: the newest found)
# DFAR_PEERS=FOLDER         the environment and candle's program (default target/peers; 7 GB, because
#                           PyPI's PyTorch for Linux loads CUDA's libraries also without a GPU)
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
out=$(realpath -m "${1:?usage: benches/peers/cpu.sh OUT [--quick] [--only PART]}")
shift
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
folder=$(realpath -m "${DFAR_PEERS:-$target/peers}")
python=$folder/venv/bin/python
cd "$root"

say() { printf -- '-- %s (%s s)\n' "$1" "$SECONDS"; }

newest_python() {
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Python 3.11 or newer is missing" >&2
    return 1
}

mkdir -p "$folder"
if ! cmp -s benches/peers/cpu/requirements.txt "$folder/installed.txt"; then
    say "packages (benches/peers/cpu/requirements.txt)"
    rm -rf "$folder/venv"
    "${PYTHON:-$(newest_python)}" -m venv "$folder/venv"
    # PyTorch without CUDA, where its own index can be reached.
    cpu=https://download.pytorch.org/whl/cpu
    torch=$(grep '^torch==' benches/peers/cpu/requirements.txt)
    "$python" -m pip install --quiet --timeout 10 --retries 0 --index-url $cpu "$torch" 2>/dev/null ||
        echo "$cpu cannot be reached: PyTorch comes from PyPI"
    "$python" -m pip install --quiet -r benches/peers/cpu/requirements.txt
    cp benches/peers/cpu/requirements.txt "$folder/installed.txt"
fi

say "dfar"
cargo build --quiet --release --locked -p dfar -p dfar-python --bins --lib
cargo build --quiet --release --locked -p dfar-baselines --example peer
rm -f "$folder"/wheels/*.whl
"$folder/venv/bin/maturin" build --quiet --release --locked -m python/Cargo.toml --interpreter "$python" --out "$folder/wheels"
"$python" -m pip install --quiet --no-deps --force-reinstall "$folder"/wheels/*.whl

say "candle"
candle=(--candle "$folder/candle/release/candle-peer")
cargo build --quiet --release --locked --manifest-path benches/peers/candle/Cargo.toml --target-dir "$folder/candle" ||
    { echo "SKIPPED: candle cannot be built"; candle=(); }

say "measurements"
# A later run finds the compiled programs of torch.compile.
export TORCHINDUCTOR_CACHE_DIR=$folder/inductor
"$python" benches/peers/cpu/run.py "$out" --bin "$target/release" "${candle[@]}" --results benches/results "$@"
