# What the other scripts share; sourced from the repository's root.

# Parallel compilations.
export CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}

say() { echo "== $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

# Changes when anything does that a wheel is made of.
source_digest() {
  {
    find src include cmake python tools packaging -type f -not -path '*/__pycache__/*'
    ls CMakeLists.txt pyproject.toml README.md LICENSE tests/*.h tests/*.cc
  } 2>/dev/null | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16
}

# configure_and_build FOLDER [TARGET] [CMAKE OPTION...]: without a target (""), everything.
configure_and_build() {
  local folder=$1 target=${2:-}
  shift $(($# > 1 ? 2 : 1))
  cmake -S . -B "$folder" "$@" >"$folder.log" 2>&1 || { cat "$folder.log"; fail "cmake, $folder"; }
  cmake --build "$folder" ${target:+--target "$target"} >>"$folder.log" 2>&1 ||
    { tail -n 100 "$folder.log"; fail "building in $folder"; }
}
