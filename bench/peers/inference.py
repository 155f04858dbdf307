#!/usr/bin/env python3
"""moru beside llama.cpp and ik_llama.cpp: one table of one run, on an otherwise idle machine.

    bench/peers/inference.py MORU [--files Q4_K_M,Q8_0] [--only decode,prefill] [--out run.json]

Programs and models are looked for in $MORU_PEERS (default ~/.cache/moru-peers): bin/llama-bench,
llama-batched-bench; models/SmolLM2-135M-*.gguf, gemma-3-270m-Q4_K_M.gguf. --ik names a folder with
ik_llama.cpp's llama-bench and llama-batched-bench, --llama-avx2 one with a llama-bench that was
built without AVX-512. Peers take turns, --rounds times; medians count. Where a peer has a setting
(flash attention, repacking at load), its better one counts. A long table may be measured in
pieces: --out keeps what is measured and a later run with the same --out adds to it.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

PEERS = os.environ.get("MORU_PEERS", os.path.expanduser("~/.cache/moru-peers"))
FILES = {name: f"SmolLM2-135M-{name}.gguf" for name in
         ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M")}
FILES = {"BF16": "SmolLM2-135M-Instruct.Q4_1-BF16.gguf", **FILES,
         "Gemma-Q4_K_M": "gemma-3-270m-Q4_K_M.gguf"}
CONTEXT = 8192
UNITS = {"load": "× reading", "memory": "× file + KV"}


class Runner:
    """Runs programs and reads their JSON."""

    def __init__(self, args):
        self.args = args

    def run(self, command, env=None, with_log=False):
        command = shlex.split(self.args.wrap) + [str(c) for c in command]
        with tempfile.TemporaryDirectory() as folder:  # where peers leave their logs
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder,
                                  env={**os.environ, **(env or {})})
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        return done.stdout + done.stderr if with_log else done.stdout

    def moru(self, model, *flags, env=None):
        out = self.run([self.args.moru, "bench", model, "--threads", self.args.threads, "--json", *flags], env)
        return json.loads(out)

    def llama(self, folder, model, *flags):
        rows = json.loads(self.run([f"{folder}/llama-bench", "-m", model, "-t", self.args.threads,
                                    "-o", "json", *flags]))
        return [r["avg_ts"] for r in rows][-1]

    def batched(self, folder, model, batch, *flags):
        """Tokens decoded a second, from llama.cpp's JSON or ik_llama.cpp's table."""
        out = self.run([f"{folder}/llama-batched-bench", "-m", model, "-t", self.args.threads, "-c", 256 * batch,
                        "-b", 512, "-ub", 512, "-npp", 128, "-ntg", 64, "-npl", batch, *flags],
                       with_log=True)  # where ik_llama.cpp's table stands
        row = [line for line in out.splitlines() if line.startswith(("|", "{"))][-1]
        return json.loads(row)["speed_tg"] if row.startswith("{") else float(row.split("|")[8])


def decode_of(row):
    return row["decode"][0]["tokens_per_s"], row["decode"][0]["of_limit"]


def prefill_of(row):
    return row["prefill_tokens_per_s"], row["prefill_of_limit"]


def measurements(args, run, model):
    """{row: {peer: [ways to measure it]}}; a way returns a rate, moru's a rate and its share of the limit."""
    llama, ik, avx2 = f"{PEERS}/bin", args.ik, args.llama_avx2
    no_prompt, no_answer = ("-p", 0, "-n", 64, "-r", 2), ("-p", 512, "-n", 0, "-r", 2)
    deep = ("-d", CONTEXT)

    def alone(flags):  # one sequence, where any is decoded
        return ("-b", 1, *flags) if flags[flags.index("-n") + 1] else flags

    def pair(flags, read, ik_flags, depth=(), int8=False):
        peers = {"moru": [lambda: read(run.moru(model, *alone(flags), *depth))],
                 **({"moru int8": [lambda: read(run.moru(model, *alone(flags), *depth, "--activations", "int8"))]}
                    if int8 and "BF16" not in model else {}),
                 "llama.cpp": [lambda fa=fa: run.llama(llama, model, *flags, *depth, "-fa", fa)
                               for fa in ((0, 1) if depth else ("auto",))]}
        if ik and ik_flags is not None:
            peers["ik"] = [lambda r=r: run.llama(ik, model, *(ik_flags or flags), "-rtr", r) for r in (0, 1)]
        return peers

    def together(batch):
        peers = {"moru": [lambda: decode_of(run.moru(model, "-p", 0, "-n", 64, "-r", 1, "-d", 128, "-b", batch))],
                 "llama.cpp": [lambda fa=fa: run.batched(llama, model, batch, "-fa", fa, "--output-format", "jsonl")
                               for fa in ("off", "on")]}
        if ik:
            peers["ik"] = [lambda r=r: run.batched(ik, model, batch, *r) for r in ((), ("-rtr",))]
        return peers

    def at_avx2(flags, read):
        if not avx2:
            return {}
        return {"moru": [lambda: read(run.moru(model, *alone(flags), env={"MORU_ISA": "avx2"}))],
                "llama.cpp": [lambda: run.llama(avx2, model, *flags)]}

    def load():
        with open(model, "rb", buffering=0) as file:
            watch, buffer = time.monotonic(), bytearray(os.path.getsize(model))
            file.readinto(buffer)
            seconds = time.monotonic() - watch
        return run.moru(model, "-p", 0, "-n", 0)["load_seconds"] / seconds, None

    def memory():
        row = run.moru(model, "-p", 512, "-n", 8, "-b", 1, "-r", 1)
        return row["peak_memory_bytes"] / (os.path.getsize(model) + row["cache_bytes"]), None

    rows = {
        "decode": pair(no_prompt, decode_of, ()),
        "prefill": pair(no_answer, prefill_of, (), int8=True),
        "context decode": pair(("-p", 0, "-n", 32, "-r", 1), decode_of,
                               ("-p", 0, "-n", 0, "-gp", f"{CONTEXT},32", "-r", 1), deep),
        "context prefill": pair(("-p", 512, "-n", 0, "-r", 1), prefill_of, None, deep),
        "batch 8": together(8),
        "batch 32": together(32),
        "avx2 decode": at_avx2(no_prompt, decode_of),
        "avx2 prefill": at_avx2(no_answer, prefill_of),
        "load": {"moru": [load]},
        "memory": {"moru": [memory]},
    }
    return {row: peers for row, peers in rows.items() if peers}


def measure(peers, rounds):
    """Each peer's best setting: (median, median share of the limit or None)."""
    seen = {peer: [[] for _ in ways] for peer, ways in peers.items()}
    for _ in range(rounds):
        for peer, ways in peers.items():
            for at, way in enumerate(ways):
                result = way()
                seen[peer][at].append(result if isinstance(result, tuple) else (result, None))
    out = {}
    for peer, settings in seen.items():
        medians = [(statistics.median(r for r, _ in s),
                    statistics.median(l for _, l in s) if s[0][1] is not None else None) for s in settings]
        out[peer] = max(medians, key=lambda m: m[0])
    return out


def number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def print_table(results):
    names = list(dict.fromkeys(name for _, name in results))
    rows = list(dict.fromkeys(row for row, _ in results))
    print("| what | file | moru | of the limit | llama.cpp | × | ik_llama.cpp | × |")
    print("|---|---|---|---|---|---|---|---|")
    lines = [(row, name, own) for row in rows for own in ("moru", "moru int8") for name in names]
    for row, name, own in lines:
        got = results.get((row, name), {})
        if own not in got:
            continue
        mine, share = got[own]
        cells = [f"{mine:.2f} {UNITS[row]}" if row in UNITS else number(mine), f"{100 * share:.0f} %" if share else ""]
        for peer in ("llama.cpp", "ik"):
            theirs = got.get(peer)
            cells += [number(theirs[0]), f"{mine / theirs[0]:.2f}"] if theirs else ["", ""]
        print(f"| {row}{own.removeprefix('moru')} | {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moru", help="the program")
    parser.add_argument("--files", default=",".join(FILES), help="of " + ", ".join(FILES) + ", or paths")
    parser.add_argument("--only", default="", help="rows whose name begins so, as decode,batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ik", default="", help="folder with ik_llama.cpp's programs")
    parser.add_argument("--llama-avx2", default="", help="folder with llama.cpp's programs, built for AVX2")
    parser.add_argument("--wrap", default="", help="put before every measured command, as 'taskset -c 0,1'")
    parser.add_argument("--out", help="JSON file to keep results in and add to")
    args = parser.parse_args()

    for name in ("moru", "ik", "llama_avx2"):
        if path := getattr(args, name):
            setattr(args, name, os.path.abspath(path))
    run, results = Runner(args), {}
    if args.out and os.path.exists(args.out):
        with open(args.out) as file:
            results = {tuple(key.split("/", 1)): value for key, value in json.load(file).items()}
    wanted = [part for part in args.only.split(",") if part]
    for name in args.files.split(","):
        model = os.path.abspath(name) if os.path.exists(name) else f"{PEERS}/models/{FILES[name]}"
        for row, peers in measurements(args, run, model).items():
            if wanted and not any(row.startswith(part) for part in wanted):
                continue
            print(f"{name}: {row}", file=sys.stderr, flush=True)
            results[row, os.path.basename(name)] = measure(peers, args.rounds)
            if args.out:
                with open(args.out, "w") as file:
                    json.dump({"/".join(key): value for key, value in results.items()}, file, indent=1)
    print_table(results)


if __name__ == "__main__":
    main()
