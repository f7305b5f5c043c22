# Sets up what cloudfs needs on a Debian-like machine; sourced by demo and test, never run by itself.
#
#   setup EXTRAS PACKAGES…    EXTRAS: extras of pyproject.toml, comma-separated, or -; PACKAGES: further Debian packages,
#                             written COMMAND=PACKAGE or /PATH=PACKAGE: installed where that is missing
#
# Afterwards .venv/bin/cloudfs runs. Nothing outside of the clone is changed but Debian packages that are missing, and
# the link /etc/mtab where a system has never been started (a container, a debootstrap root).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

say() { if [ -t 2 ]; then printf '\033[1m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi; }
fail() { printf 'cloudfs: %s\n' "$*" >&2; exit 1; }

python_fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${CLOUDFS_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && python_fits "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

missing_packages() {
    local python pair
    if ! python=$(find_python); then
        echo python3 python3-venv python3-dev
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || echo python3-dev
    fi
    command -v fusermount3 >/dev/null || echo fuse3
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v pkg-config >/dev/null && pkg-config --exists fuse3; } || echo libfuse3-dev
    command -v gcc >/dev/null || echo gcc libc6-dev
    for pair in "$@"; do
        case $pair in
        /*) [ -e "${pair%%=*}" ] ;;
        *) command -v "${pair%%=*}" >/dev/null ;;
        esac || echo "${pair#*=}"
    done
}

install_packages() {
    local missing privileged=()
    missing=$(missing_packages "$@" | tr '\n' ' ')
    missing=${missing% }
    [ -z "$missing" ] && return 0
    command -v apt-get >/dev/null ||
        fail "this machine has no apt-get; install what these Debian packages hold, then run this again: $missing"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            fail "packages are missing and there is no sudo; as root run: apt-get install $missing"
        privileged=(sudo)
    fi
    say "installing Debian packages: $missing"
    local log
    log=$(mktemp)
    # shellcheck disable=SC2086  # a list of words
    if ! { "${privileged[@]}" apt-get update -qq &&
        "${privileged[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        fail "apt-get could not install $missing; see above, mend it, and run this again"
    fi
    rm -f "$log"
    missing=$(missing_packages "$@" | tr '\n' ' ')
    [ -z "${missing% }" ] || fail "still missing after the installation: $missing(is python3 at least 3.11?)"
}

# Its scripts carry the path at which it was made; python3 -m venv notes that path since 3.11.
venv_works() {
    "$venv/bin/python" -c 'import pip' 2>/dev/null || return 1
    ! grep -q '^command = ' "$venv/pyvenv.cfg" || grep -qF -- "$venv" "$venv/pyvenv.cfg"
}

make_venv() {
    local python=$1
    if [ -e "$venv" ] && ! venv_works; then
        say "the virtual environment in .venv is broken (was the folder moved?); making it anew"
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        say "making a virtual environment in .venv ($("$python" --version))"
        "$python" -m venv "$venv" || { rm -rf "$venv"; fail "python could not make a virtual environment in $venv"; }
    fi
}

setup() {
    local extras=$1 python wanted stamp log what why
    shift
    install_packages "$@"
    need_mtab
    python=$(find_python) || fail "python 3.11 or newer is needed; set CLOUDFS_PYTHON to one"
    make_venv "$python"
    what=.
    [ "$extras" = - ] || what=".[$extras]"
    stamp=$venv/.cloudfs-${extras//[^a-z]/-}
    wanted="$root $(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing cloudfs and what it stands on into .venv"
        log=$venv/cloudfs-install.log
        # PIP_CONSTRAINT holds for building too, but is split at spaces: the path must not have any.
        if ! (cd "$root" && PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt \
            "$venv/bin/python" -m pip install -q -e "$what") >"$log" 2>&1 </dev/null; then
            why=$(grep -E '^ *ERROR: ' "$log" | tail -n 1 | sed 's/^ *ERROR: //') || true
            fail "pip could not install cloudfs (${why:-no reason given}); is the network there? Run this again then;" \
                "all that pip said is in $log"
        fi
        printf '%s' "$wanted" >"$stamp"
    fi
}

# fusermount3 unmounts nothing for users where there is no /etc/mtab; systemd makes the link when a system starts.
need_mtab() {
    local privileged=()
    [ -e /etc/mtab ] && return 0
    [ "$(id -u)" -eq 0 ] || privileged=(sudo)
    say "making the link /etc/mtab, which fusermount3 needs"
    "${privileged[@]}" ln -sf ../proc/self/mounts /etc/mtab 2>/dev/null </dev/null || [ -e /etc/mtab ] ||
        fail "there is no /etc/mtab, which fusermount3 needs; as root run: ln -s ../proc/self/mounts /etc/mtab"
}

need_fuse() {
    [ -e /dev/fuse ] || { [ "$(id -u)" -eq 0 ] && modprobe fuse 2>/dev/null; } || true
    [ -e /dev/fuse ] || fail "there is no /dev/fuse; load the module (sudo modprobe fuse), or in a container pass" \
        "--device /dev/fuse --cap-add SYS_ADMIN"
    [ -r /dev/fuse ] && [ -w /dev/fuse ] ||
        fail "/dev/fuse is not open to you (ls -l /dev/fuse); as root run: chmod 666 /dev/fuse"
}
