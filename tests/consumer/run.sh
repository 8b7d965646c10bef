#!/bin/sh
# Builds a project outside the tree against an installation, and runs it.
#   tests/consumer/run.sh INSTALL_PREFIX
set -eu
if [ $# -ne 1 ]; then
  echo "usage: $0 INSTALL_PREFIX" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
prefix=$(cd "$1" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cmake -S "$here" -B "$build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$build" >/dev/null
for program in consumer_cc consumer_c consumer_strict; do
  "$build/$program"
done
