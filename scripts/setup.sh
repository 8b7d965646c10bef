#!/usr/bin/env bash
# Makes a fresh Debian or Ubuntu machine ready: system packages where missing, the virtual environment
# .venv with requirements-dev.txt, and the package, built and installed into it. A second run does
# nothing but look. Needs root or sudo only where a system package is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

has_cxx20() {
  command -v g++ >/dev/null && echo '#include <span>' | g++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null
}

has_header() {
  echo "#include <$1>" | g++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null
}

has_venv() {
  command -v python3 >/dev/null && python3 -c 'import ensurepip, venv' 2>/dev/null
}

install_system_packages() {
  local missing=()
  has_cxx20 || missing+=(g++)
  command -v cmake >/dev/null || missing+=(cmake)
  command -v make >/dev/null || missing+=(make)
  if ((${#missing[@]})) || ! has_header hwy/highway.h; then missing+=(libhwy-dev); fi
  if ((${#missing[@]})) || ! has_header gtest/gtest.h; then missing+=(libgtest-dev); fi
  has_venv || missing+=(python3-venv)
  # The tests for 64-bit Arm: a cross compiler, and an emulator for what it builds.
  command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
  command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
  ((${#missing[@]})) || return 0

  say "installing system packages: ${missing[*]}"
  command -v apt-get >/dev/null || fail "install these by hand, this system has no apt-get: ${missing[*]}"
  local as_root=()
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || fail "run as root, or install by hand: ${missing[*]}"
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
    --no-install-recommends "${missing[@]}" >/dev/null
}

check_python() {
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "python3 is $(python3 --version 2>&1), and 3.10 or newer is needed"
}

install_python_packages() {
  local stamp
  stamp=.venv/requirements-$(sha256sum requirements-dev.txt | cut -c1-16)
  [[ -e $stamp ]] && return 0
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  say "installing the Python packages of requirements-dev.txt"
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
  touch "$stamp"
}

install_package() {
  local stamp
  stamp=.venv/package-$(source_digest)
  [[ -e $stamp ]] && return 0
  say "building the wheel (the first time takes a few minutes)"
  scripts/build_wheel.sh
  .venv/bin/python -m pip install -qq --disable-pip-version-check --force-reinstall --no-deps \
    dist/*.whl
  rm -f .venv/package-*
  touch "$stamp"
}

install_system_packages
check_python
install_python_packages
install_package
say "ready: .venv has $(.venv/bin/python -c 'import flash_attn; print("FlashAttention-Plus", flash_attn.plus_version)')"
