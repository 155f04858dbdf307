#!/usr/bin/env python3
"""What a program's arithmetic costs beside f32 on the same weights: moru and the llama.cpp family.

    bench/peers/execution_error.py MORU TEXT [--files Q4_K_M,Q8_0] [--ik FOLDER] [--chunks 8]

For each file the mean KLD of its distributions against f32 arithmetic on its own dequantized
weights, chunks of 512 tokens of which positions 256–510 count. moru does both itself; a peer's
reference is the file that its llama-quantize turns to F32. --ik names a folder with ik_llama.cpp's
llama-quantize and llama-perplexity. Programs and models are found as inference.py finds them.
"""
import argparse
import os
import re
import subprocess
import tempfile

from inference import FILES, PEERS


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def of_moru(args, model, activations):
    out = run(args.moru, "prove", model, "--text", args.text, "--chunks", args.chunks, "--threads",
              args.threads, "--activations", activations)
    return float(re.search(r"KLD mean ([0-9.e+-]+)", out)[1])


def of_peer(args, folder, model):
    with tempfile.TemporaryDirectory() as temp:
        exact, base = f"{temp}/f32.gguf", f"{temp}/base"
        run(f"{folder}/llama-quantize", "--allow-requantize", model, exact, "F32")
        common = ("-f", args.text, "-c", 512, "--chunks", args.chunks, "-t", args.threads,
                  "--kl-divergence-base", base)
        run(f"{folder}/llama-perplexity", "-m", exact, *common)
        out = run(f"{folder}/llama-perplexity", "-m", model, *common, "--kl-divergence")
    return float(re.search(r"Mean\s+KLD:\s*([0-9.e+-]+)", out)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moru")
    parser.add_argument("text")
    parser.add_argument("--files", default=",".join(name for name in FILES if name != "BF16"))
    parser.add_argument("--ik")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print("| file | moru int16 | moru int8 | llama.cpp | ik_llama.cpp |\n|---|---|---|---|---|", flush=True)
    for name in args.files.split(","):
        model = f"{PEERS}/models/{FILES[name]}"
        cells = [of_moru(args, model, "int16"), of_moru(args, model, "int8"), of_peer(args, f"{PEERS}/bin", model)]
        if args.ik:
            cells.append(of_peer(args, args.ik, model))
        print(f"| {name} | " + " | ".join(f"{c:.2e}" for c in cells) + (" |" if args.ik else " | |"), flush=True)


if __name__ == "__main__":
    main()
