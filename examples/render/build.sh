#!/bin/sh
# Rebuild render.wasm from render.c. Debian and Ubuntu packages: clang lld wasi-libc libclang-rt-14-dev-wasm32
# (the number is that of `clang --version`).
set -eu
cd "$(dirname "$0")"
clang --target=wasm32-wasi -std=gnu11 -O3 -fno-math-errno -Wall -Wextra -Werror \
    -Wl,--strip-all -Wl,-z,stack-size=262144 -o render.wasm render.c -lm
ls -l render.wasm
