#!/usr/bin/env python3
"""What `moru tune` says it will take, beside what it took: a table of one run.

    bench/plan.py MORU [--only lora,gemma,...] [--threads N] [--wrap COMMAND]

Every row is a run of two steps on made-up text in a process of its own; its peak is the largest
resident set that the kernel counted (VmHWM). Models are looked for in $MORU_PEERS (default
~/.cache/moru-peers). Ends with exit code 1 if a plan is off by more than 10 %.
"""
import argparse
import json
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import tempfile

MODELS = pathlib.Path(os.environ.get("MORU_PEERS", os.path.expanduser("~/.cache/moru-peers"))) / "models"
SMOL = "SmolLM2-135M-Instruct.Q4_1-hf"
LONG = ["--max-length", "512", "--batch-size", "4"]
ROWS = {  # name: what it is, model, rows, flags
    "lora": ("LoRA r 16, 4 × 512, bf16", SMOL, "long", LONG),
    "gemma": ("Gemma-3-270M LoRA, 4 × 512", "gemma-3-270m-Q4_K_M-hf", "long", LONG),
    "qlora": ("QLoRA on Q4_K_M, 4 × 512", "SmolLM2-135M-Q4_K_M.gguf", "long", LONG + ["--qlora"]),
    "full": ("every weight, 4 × 512", SMOL, "long", LONG + ["--full"]),
    "dpo": ("DPO, 8 pairs", SMOL, "pairs", ["--method", "dpo", "--batch-size", "8"]),
    "f32": ("LoRA, 64 short rows, f32", SMOL, "short", ["--precision", "f32", "--batch-size", "64"]),
}


def text(rng, words):
    return " ".join(rng.choice("the of a cat tree house walks sees blue three mountain letter".split())
                    for _ in range(words))


def write_rows(folder):
    rng = random.Random(3)
    rows = {
        "long": [{"prompt": text(rng, 8), "completion": text(rng, 700)} for _ in range(40)],
        "short": [{"prompt": text(rng, 12), "completion": text(rng, 10)} for _ in range(256)],
        "pairs": [{"prompt": text(rng, 120), "chosen": text(rng, 60), "rejected": text(rng, 60)}
                  for _ in range(40)],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def measure(args, folder, name):
    _, model, rows, flags = ROWS[name]
    # A base model has no chat template.
    plain = ["--template", "{prompt}\\n{completion}"]
    command = shlex.split(args.wrap) + [
        args.moru, "tune", MODELS / model, folder / f"{rows}.jsonl", "--out", folder / name, "--max-steps", "2",
        "--threads", args.threads, "--json", *plain, *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-400:]}")
    planned = re.search(r"peak (\d+) MB", done.stderr)
    return int(planned.group(1)), json.loads(done.stdout)["peak_bytes"] / 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("moru")
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wrap", default="", help="put before each command")
    args = parser.parse_args()
    off = False
    print(f"{'':30}{'planned MB':>12}{'peak MB':>10}{'plan is':>10}")
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_rows(folder)
        for name in args.only.split(","):
            planned, peak = measure(args, folder, name)
            off |= abs(planned / peak - 1) > 0.1
            print(f"{ROWS[name][0]:30}{planned:12.0f}{peak:10.0f}{100 * (planned / peak - 1):+8.1f} %",
                  flush=True)
    sys.exit(off)


if __name__ == "__main__":
    main()
