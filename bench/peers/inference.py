#!/usr/bin/env python3
"""Prefill and decode beside llama.cpp, one table from one run on an otherwise idle machine.

    bench/peers/inference.py MORU MODEL.gguf [MODEL.gguf …]

llama.cpp's llama-bench is looked for in $MORU_PEERS/bin (default ~/.cache/moru-peers/bin). The two
programs take turns, three rounds each; medians are printed.
"""
import json
import os
import statistics
import subprocess
import sys

PEERS = os.environ.get("MORU_PEERS", os.path.expanduser("~/.cache/moru-peers"))
PROMPT, ANSWER, ROUNDS, THREADS = 512, 64, 3, 2


def moru_rates(program, model):
    out = subprocess.run([program, "bench", model, "-p", str(PROMPT), "-n", str(ANSWER), "-r", "3",
                          "--threads", str(THREADS), "--json"], capture_output=True, text=True, check=True)
    row = json.loads(out.stdout)
    return row["prefill_tokens_per_s"], row["decode_tokens_per_s"]


def llama_rates(model):
    out = subprocess.run([f"{PEERS}/bin/llama-bench", "-m", model, "-t", str(THREADS), "-p", str(PROMPT),
                          "-n", str(ANSWER), "-r", "3", "-o", "json"], capture_output=True, text=True, check=True)
    rows = json.loads(out.stdout)
    prompt = [r["avg_ts"] for r in rows if r["n_prompt"]]
    answer = [r["avg_ts"] for r in rows if r["n_gen"]]
    return prompt[0], answer[0]


def main():
    program, models = sys.argv[1], sys.argv[2:]
    if not models:
        sys.exit(__doc__)
    print(f"prefill of {PROMPT} and decode of {ANSWER} tokens, {THREADS} threads, tokens/s")
    print(f"{'file':<38}{'moru':>8}{'llama':>8}{'ratio':>7}{'moru':>9}{'llama':>8}{'ratio':>7}")
    for model in models:
        mine, theirs = [], []
        for _ in range(ROUNDS):
            mine.append(moru_rates(program, model))
            theirs.append(llama_rates(model))
        cells = []
        for i in (0, 1):
            a = statistics.median(r[i] for r in mine)
            b = statistics.median(r[i] for r in theirs)
            cells += [a, b, a / b]
        name = os.path.basename(model).removesuffix(".gguf")[:37]
        print(f"{name:<38}{cells[0]:>8.0f}{cells[1]:>8.0f}{cells[2]:>7.2f}"
              f"{cells[3]:>9.1f}{cells[4]:>8.1f}{cells[5]:>7.2f}", flush=True)


main()
