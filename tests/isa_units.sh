#!/usr/bin/env bash
# isa_units.sh ARCHIVE…: no object but those of *_avx2.cc and *_avx512.cc holds a wider instruction
# than the x86-64 baseline, and none but *_avx512.cc a 512-bit one. Otherwise the linker may take an
# inline function compiled for a newer processor for the whole program, which then dies on others.
set -euo pipefail
found=$(objdump --disassemble --no-show-raw-insn "$@" | awk '
  /file format/ { unit = $1; sub(/:$/, "", unit); units++ }
  /%zmm/ { if (unit !~ /_avx512\.cc/ && !(unit in seen)) { seen[unit]; print unit ": 512-bit" } else zmm++ }
  /%ymm/ { if (unit !~ /_avx(2|512)\.cc/ && !(unit in seen)) { seen[unit]; print unit ": 256-bit" } }
  END { if (units < 20 || zmm == 0) print "objdump showed too little: " units " objects" }')
if [ -n "$found" ]; then
  echo "$found"
  exit 1
fi
