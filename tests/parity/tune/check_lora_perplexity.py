"""Checks that an adapter acts in llama.cpp as it does in moru: run by hand.

check_lora_perplexity.py MORU PEERS TEXT   (llama-perplexity in PEERS/bin, models in PEERS/models)

A LoRA and a rank-stabilised one of SmolLM2-135M-Instruct learn examples/support for twelve steps and
are written for llama.cpp. The perplexity of four chunks of TEXT (wikitext-2, say) under the base and
each adapter has to be the same in both programs, and the adapters have to change it by far more than
the two differ. Without the peers it says so and checks nothing.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

CHUNKS = 4
SAME = 2e-3     # relative difference of the two programs, both in bf16
CHANGED = 0.05  # what an adapter has to change at least
PAIRS = pathlib.Path(__file__).parents[3] / "examples/support/pairs.jsonl"


def run(*words):
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{words[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


def main(moru, peers, text):
    base = peers / "models/SmolLM2-135M-Instruct.Q4_1-BF16.gguf"
    llama = peers / "bin/llama-perplexity"
    for needed in (base, llama, text):
        if not needed.exists():
            print(f"skipped: there is no {needed}")
            return
    work = pathlib.Path(tempfile.mkdtemp())

    def in_moru(*more):
        return json.loads(run(moru, "prove", base, "--text", text, "--chunks", CHUNKS,
                              "--reference-precision", "bf16", "--json", *more).stdout)["perplexity"]

    def in_llama(*more):
        told = run(llama, "-m", base, "-f", text, "-c", 512, "--chunks", CHUNKS, "-t", 2, *more)
        return float(re.search(r"Final estimate: PPL = ([0-9.]+)", told.stdout + told.stderr).group(1))

    failed = False
    plain = None
    # A rank-stabilised adapter acts four times as strongly, so it learns at a lower rate.
    for name, more in (("none", None), ("LoRA", ["--lr", "4e-3"]),
                       ("rsLoRA", ["--lr", "1e-3", "--use-rslora"])):
        flags, lora = [], []
        if more is not None:
            out = work / name
            run(moru, "tune", base, PAIRS, "-o", out, "--max-steps", 12, *more)
            run(moru, "adapter", base, out / "adapter", "-o", work / f"{name}.gguf")
            flags, lora = ["--adapter", out / "adapter"], ["--lora", work / f"{name}.gguf"]
        ours, theirs = in_moru(*flags), in_llama(*lora)
        plain = plain or ours
        apart, changed = abs(ours / theirs - 1), abs(ours / plain - 1)
        fine = apart < SAME and (more is None or changed > CHANGED)
        failed = failed or not fine
        print(f"{name:7} moru {ours:.3f}, llama.cpp {theirs:.3f}: {apart:.1e} apart, "
              f"{changed:.0%} from the base{'' if fine else '  FAILED'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(*(pathlib.Path(word).resolve() for word in sys.argv[1:4]))
