#!/usr/bin/env python3
"""moru's training beside torch: one table of one run, on an otherwise idle machine.

    bench/peers/training.py TRAIN_BENCH [--only lora,rows,short,full,finetune,pairs,gemma,packed]
                            [--text FILE] [--rounds N] [--wrap COMMAND]

torch, transformers and PEFT run in this interpreter's environment (start it with the peers' python);
models are looked for in $MORU_PEERS (default ~/.cache/moru-peers). Both sides use --threads threads,
bf16 and the same tokens, the first of --text or else even draws from the vocabulary (which no model
expects, so that moru's head finds nothing to leave out); the best of three steps counts, and of
--rounds rounds, in which the two take turns, the median, beside the lowest and highest ratio of a
round. "packed" (QLoRA) is compared with moru's own LoRA of the same round, "finetune" with llama.cpp's
llama-finetune, which learns every weight of an f32 file. A peer runs in a process of its own, so that
its peak memory is its own. What TRL does for a step of DPO without precomputed reference: the
policy's and the reference's forward pass over both answers, each with its own prompt, the same
forward pass being the reference's with the adapter off. Rows of unequal length are padded to the
longest of their batch, TRL's default; of one batch of 64 and eight of 8, TRL's default again, the
faster one counts.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from statistics import median

PEERS = os.environ.get("MORU_PEERS", os.path.expanduser("~/.cache/moru-peers"))
SMOL = f"{PEERS}/models/SmolLM2-135M-Instruct.Q4_1-hf"
GEMMA = f"{PEERS}/models/gemma-3-270m-Q4_K_M-hf"
ROWS = {  # name: model, bench's shape, bench's flags, the peer's mode
    "lora": (SMOL, "lora", [], "lora"),
    "rows": (SMOL, "rows", [], "rows"),
    "short": (SMOL, "short", [], "short"),
    "full": (SMOL, "full", [], "full"),
    "finetune": (SMOL, "full", [], "finetune"),
    "pairs": (SMOL, "pairs", [], "pairs"),
    "gemma": (GEMMA, "lora", [], "lora"),
    "packed": (f"{PEERS}/models/SmolLM2-135M-Q4_K_M.gguf", "lora", ["--packed"], None),
}

# Rows of Banking77 as SmolLM2 splits them, prompt and answer: 64 quantiles of their lengths.
SHORT_ROWS = [
    21, 23, 22, 26, 32, 37, 23, 38, 29, 29, 17, 23, 18, 22, 21, 24, 21, 36, 34, 28, 24, 25, 23, 26, 25, 25,
    31, 52, 29, 28, 23, 31, 27, 45, 57, 27, 22, 20, 27, 32, 30, 26, 30, 22, 41, 24, 25, 20, 18, 22, 26, 43,
    27, 24, 20, 26, 33, 19, 19, 67, 24, 21, 48, 28
]


def tokens(model_path, shape, vocab, text):
    import torch
    if not text:
        return torch.randint(100, vocab - 100, shape)
    from transformers import AutoTokenizer
    with open(text) as file:
        ids = AutoTokenizer.from_pretrained(model_path)(file.read(), add_special_tokens=False).input_ids
    count = shape[0] * shape[1]
    return torch.tensor((ids * (count // len(ids) + 1))[:count]).reshape(shape)


def llama_finetune(threads, text):
    """Tokens a second of 16 windows of 512, of which half is new, and the process's peak memory."""
    import resource
    model = f"{PEERS}/models/SmolLM2-135M-Instruct-F32.gguf"
    if not os.path.exists(model):
        sys.exit(f"{model} is missing: moru lighten {SMOL} --type F32 -o {model}")
    if not text:
        sys.exit("finetune learns words: give --text")
    with tempfile.TemporaryDirectory() as folder:
        with open(text) as file, open(f"{folder}/text", "w") as start:
            start.write(file.read()[:25_000])
        done = subprocess.run([f"{PEERS}/bin/llama-finetune", "-m", model, "-f", f"{folder}/text", "-c", "512",
                               "-b", "512", "-ub", "512", "-t", str(threads), "--epochs", "1",
                               "-o", f"{folder}/learnt.gguf"], capture_output=True, text=True)
    told = re.findall(r"train: .*?data=(\d+)/.*?t=(\d+):(\d+):(\d+)", done.stdout + done.stderr)
    if done.returncode != 0 or not told:
        sys.exit(f"llama-finetune: {done.stderr[-400:]}")
    count, hours, minutes, seconds = map(int, told[-1])
    return {"tokens_per_second": 512 * count / (3600 * hours + 60 * minutes + seconds),
            "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def peer(model_path, mode, threads, text):
    """One measurement in this process: prints a line of JSON."""
    if mode == "finetune":
        return print(json.dumps(llama_finetune(threads, text)))
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    vocab = model.config.vocab_size
    if mode != "full":
        model = get_peft_model(model, LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    if mode == "short":
        return print(json.dumps(peer_short(model)))
    shape = {"lora": (4, 512), "full": (4, 512), "rows": (58, 35), "pairs": (16, 192)}[mode]
    ids = tokens(model_path, shape, vocab, text)
    labels = ids.clone()
    if mode == "rows":
        labels[:, : 35 - 10] = -100
    if mode == "pairs":
        ids[8:, :128] = ids[:8, :128]
        labels[:, :128] = -100

    def logps():
        logits = model(input_ids=ids).logits[:, 127:-1].float()
        chosen = torch.gather(logits.log_softmax(-1), 2, ids[:, 128:, None]).squeeze(2)
        return chosen.sum(1)

    def loss():
        if mode != "pairs":
            return model(input_ids=ids, labels=labels).loss
        with torch.no_grad(), model.disable_adapter():
            reference = logps()
        ratio = logps() - reference
        return -torch.nn.functional.logsigmoid(0.1 * (ratio[:8] - ratio[8:])).mean()

    print(json.dumps(timed(model, ids.numel(), lambda: loss().backward())))


def timed(model, tokens, backward):
    """Tokens a second of the best of three steps, and this process's peak memory."""
    import resource
    import time

    import torch
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4)
    seconds = []
    for _ in range(3):
        start = time.time()
        backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": tokens / min(seconds), "peak_bytes": peak}


def peer_short(model):
    """Rows of unequal length, padded by batch; the gradients of a step's batches are added."""
    import torch

    def backward(rows_a_batch):
        learnt_tokens = sum(length // 4 for length in SHORT_ROWS)
        for first in range(0, len(SHORT_ROWS), rows_a_batch):
            lengths = SHORT_ROWS[first:first + rows_a_batch]
            ids = torch.randint(100, model.config.vocab_size - 100, (len(lengths), max(lengths)))
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for row, length in enumerate(lengths):
                labels[row, length - length // 4:length] = ids[row, length - length // 4:length]
                mask[row, :length] = 1
            model(input_ids=ids, attention_mask=mask, labels=labels,
                  num_items_in_batch=learnt_tokens).loss.backward()

    results = [timed(model, sum(SHORT_ROWS), lambda: backward(size)) for size in (8, 64)]
    return max(results, key=lambda result: result["tokens_per_second"])


def last_json(command, wrap):
    done = subprocess.run(shlex.split(wrap) + [str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bench")
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--text", default="", help="a text whose tokens both learn")
    parser.add_argument("--wrap", default="", help="put before each command, to run it alone")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.bench, args.peer, args.threads, args.text)
    print(f"{'':10}{'moru t/s':>10}{'of products':>13}{'peak MB':>9}{'peer t/s':>11}{'peak MB':>9}"
          f"{'ratio':>8}{'lowest':>8}{'highest':>8}")
    for name in args.only.split(","):
        rounds = [measure(name, args) for _ in range(args.rounds)]
        ours, theirs = ([pair[side] for pair in rounds] for side in (0, 1))
        speed = [median(row["tokens_per_second"] for row in side) for side in (ours, theirs)]
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in rounds]
        print(f"{name:10}{speed[0]:10.0f}{100 * median(row['share_of_products'] for row in ours):11.0f} %"
              f"{median(row['peak_bytes'] for row in ours) / 1e6:9.0f}"
              f"{speed[1]:11.0f}{median(row['peak_bytes'] for row in theirs) / 1e6:9.0f}"
              f"{median(ratios):7.2f}×{min(ratios):7.2f}×{max(ratios):7.2f}×", flush=True)


def measure(name, args):
    """moru's row and the peer's, of one round."""
    model, shape, flags, mode = ROWS[name]

    def ours(model, shape, flags):
        return last_json([args.bench, model, "--threads", args.threads, "--json", "--text", args.text, *flags,
                          shape], args.wrap)
    row = ours(model, shape, flags)
    if not mode:
        return row, ours(*ROWS["lora"][:3])
    return row, last_json([sys.executable, "-P", os.path.abspath(__file__), model, "--threads",
                           args.threads, "--text", args.text, "--peer", mode], args.wrap)


if __name__ == "__main__":
    main()
