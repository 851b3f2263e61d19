#!/usr/bin/env bash
# Makes .venv with the pinned CPU set and proves that it works. Called first by tools/quickstart.sh and tools/test.sh.
#   tools/setup.sh           install what is missing or broken; under 3 s when nothing is
#   tools/setup.sh --check   prove an existing installation again
# PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIST=tools/requirements-cpu.txt
TORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu
NEED_GB=6
VENV=.venv
STAMP=$VENV/.megarl-setup
LOG=$VENV/setup.log

refuse() { echo "error: $1" >&2; exit 2; }
fail() { echo "error: $1 (log: $LOG)" >&2; exit 1; }
say() { echo "setup: $1"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} $(type -ap python3.11 || true) /usr/bin/python3.11 /usr/local/bin/python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

fingerprint() { { sed "/^\[tool.ruff\]/q" pyproject.toml; cat "$LIST" "$VENV/pyvenv.cfg"; pwd -P; } 2>/dev/null | sha256sum | cut -d' ' -f1; }
venv_works() { "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

# pip's words go into the log, a count to the terminal; of the words only errors are of use, and those are shown.
pip_install() {
    local total=$1 pid
    shift
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >>"$LOG" 2>&1 &
    pid=$!
    trap 'kill $pid 2>/dev/null || true' EXIT
    while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
        printf '\rsetup: %3d of %d packages fetched' \
            "$(grep -cE '^(Collecting|Processing|Requirement already)' "$LOG" || true)" "$total"
        sleep 1
    done
    [ -t 1 ] && printf '\r\033[K'
    local code=0
    wait "$pid" || code=$?
    trap - EXIT
    return "$code"
}

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$LIST")
    grep -q '^torch==' <<<"$broken" || return 0
    say "installing torch $version (CPU build)"
    # The configured sources first, under the name that only a CPU build carries; plain `torch` may be a CUDA build.
    pip_install 1 --no-deps --force-reinstall "torch==$version+cpu" ||
        pip_install 1 --no-deps --force-reinstall --index-url "$TORCH_CPU_WHEELS" "torch==$version+cpu" ||
        pip_install 1 --no-deps --force-reinstall "torch==$version" ||
        fail "torch $version was found neither in pip's configured sources nor at $TORCH_CPU_WHEELS; configure a source that has it"
    ! "$VENV/bin/python" tools/prove.py --broken "$LIST" | grep -q '^torch==' ||
        fail "torch $version came as a CUDA build; configure a source of CPU builds for pip"
}

main() {
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
        refuse "platform $(uname -s) $(uname -m): the pinned wheels are for Linux x86_64; use such a machine or container"
    grep -qwm1 avx2 /proc/cpuinfo || refuse "this CPU has no AVX2, which vLLM's CPU build needs; use a newer machine"

    exec 9<. && flock 9 # one set-up at a time per checkout

    if [ "${1:-}" != --check ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ] && venv_works; then
        say "$VENV is complete"
        return
    fi
    local python
    python=$(find_python)
    [ -n "$python" ] || refuse "no Python 3.11 with venv found; install it (Debian: apt install python3.11-venv) or set PYTHON"
    local total broken home
    total=$(grep -c '==' "$LIST")
    home=$(sed -n 's/^# made in //p' "$VENV/pyvenv.cfg" 2>/dev/null || true)
    if ! venv_works || [ "${home:-$(pwd -P)}" != "$(pwd -P)" ]; then # absent, broken, or moved: scripts name their folder
        check_disk
        say "making $VENV with $("$python" --version)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || refuse "$python cannot make a virtual environment; install its venv package"
        echo "# made in $(pwd -P)" >>"$VENV/pyvenv.cfg"
    fi
    rm -f "$STAMP"
    : >"$LOG"
    broken=$("$VENV/bin/python" tools/prove.py --broken "$LIST")
    if [ -n "$broken" ]; then
        check_disk
        say "installing $(wc -w <<<"$broken") of $total packages (3.4 GB when complete; takes 2 to 5 minutes)"
        rm -rf "$VENV"/lib/python3.11/site-packages/~*
        install_torch
        local others
        others=$(grep -v '^torch==' <<<"$broken" || true)
        [ -z "$others" ] || pip_install "$(wc -l <<<"$others")" --no-deps --force-reinstall -r <(echo "$others") ||
            { grep -E '^ *(ERROR|error)' "$LOG" | head -3 >&2; fail "pip could not install the pinned set; see the log, then run this again"; }
    fi
    pip_install 1 --no-deps --no-build-isolation -e . || fail "megarl itself could not be installed"
    "$VENV/bin/python" tools/prove.py "$LIST" 2>>"$LOG" || fail "the installation does not work: $(tail -n 1 "$LOG")"
    fingerprint >"$STAMP"
    say "$VENV is complete"
}

check_disk() {
    local free
    free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
    [ "$free" -ge "$NEED_GB" ] || refuse "$free GB free in $PWD: the installation needs $NEED_GB GB; free some or use another disk"
}

main "$@"
