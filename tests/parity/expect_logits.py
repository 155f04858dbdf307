"""Expected f32 logits of real models, by transformers.

    python tests/parity/expect_logits.py PEERS/models tests/golden/logits.json

For each model: three prompts, and after each a greedy continuation of 40 tokens; the logits of a
few vocabulary entries at every position. tests/engine/logits_test.cc compares (max abs ≤ 1e-3).
"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = ["SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m-Q4_K_M"]
PROMPTS = [
    "The capital of France is",
    "서울에서 부산까지 기차로 걸리는 시간은",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
]
CONTINUATION = 40
COLUMNS = 24


def main():
    folder, out = sys.argv[1:3]
    torch.set_num_threads(2)
    result = {}
    for name in MODELS:
        path = f"{folder}/{name}-hf"
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        cases = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                full = model.generate(ids, max_new_tokens=CONTINUATION, min_new_tokens=CONTINUATION, do_sample=False)
                logits = model(full).logits[0]
            vocab = logits.shape[1]
            columns = [(i * 7919 + 13) % vocab for i in range(COLUMNS)]
            cases.append({
                "prompt_tokens": ids.shape[1],
                "ids": full[0].tolist(),
                "columns": columns,
                "logits": [[round(float(v), 5) for v in row] for row in logits[:, columns]],
            })
        result[name] = cases
    with open(out, "w") as file:
        json.dump(result, file, separators=(",", ":"))


main()
