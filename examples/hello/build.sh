#!/bin/sh
# Rebuild hello.wasm from hello.c (packages: see ../render/build.sh).
set -eu
cd "$(dirname "$0")"
clang --target=wasm32-wasi -std=gnu11 -Os -Wall -Wextra -Werror -Wl,--strip-all -o hello.wasm hello.c
ls -l hello.wasm
