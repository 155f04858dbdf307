"""Writes tests/golden/dequantize/<TYPE>.bin: a few blocks of random codes, then their values as
the `gguf` Python package decodes them (f32, little endian). dtype_test compares the bits.

    pip install gguf numpy
    python tests/parity/expect_dequantize.py tests/golden/dequantize
"""

import pathlib
import sys

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Type: byte offsets of the halfs in a block, which get plausible scales instead of random bits.
HALFS = {
    "F16": [], "BF16": [],
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, halfs in HALFS.items():
        rng = numpy.random.default_rng(seed=sum(name.encode()))
        kind = GGMLQuantizationType[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = {1: 64, 32: 8, 256: 2}[block]
        blocks = rng.integers(0, 256, size=(count, block_bytes), dtype=numpy.uint8)
        for at in halfs:
            scales = rng.normal(scale=0.01, size=(count, 1)).astype("<f2")
            blocks[:, at:at + 2] = scales.view(numpy.uint8)
        if block == 1:  # ordinary numbers, not the random bits of NaNs
            values = rng.normal(size=(count, 1)).astype("<f4")
            blocks = (values.astype("<f2").view(numpy.uint8) if name == "F16"
                      else values.view(numpy.uint8)[:, 2:].copy())
        decoded = dequantize(blocks.reshape(-1), kind).astype("<f4")
        (folder / f"{name}.bin").write_bytes(blocks.tobytes() + decoded.tobytes())


main()
