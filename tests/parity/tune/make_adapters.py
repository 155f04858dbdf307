"""Makes tests/golden/tune/patterns: an adapter as PEFT writes it, with ranks and alphas by pattern
and a rank-stabilised scale, and what PEFT computes with it.

make_adapters.py tests/golden/tune   (torch, transformers, peft, safetensors)

The base is tests/golden/tune/llama. losses.safetensors holds ids [1, n] and the loss of every token
after the first, in f32.
"""
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(golden):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(golden / "llama", dtype=torch.float32,
                                                 attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
        rank_pattern={r".*layers\.0.*(q|k)_proj": 3, "down_proj": 6},
        alpha_pattern={r"layers\.1\.mlp\..*": 9, "v_proj": 2}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.15)
    ids = torch.tensor([[i * 21 % 256 for i in range(40)]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    out = golden / "patterns"
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    save_file({"ids": ids, "losses": losses}, out / "losses.safetensors")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
