"""Makes adapters as PEFT writes them, each with what PEFT computes with it.

make_adapters.py tests/golden/tune [NAME...]   (torch, transformers, peft, safetensors)

  patterns   ranks and alphas by pattern, and a rank-stabilised scale
  modules    modules_to_save: the head and the last norm
  tied       modules_to_save: the embedding of a model whose head it is (ensure_weight_tying)
  own_head   modules_to_save: the head of such a model, which then is another matrix
  norms      modules_to_save: norms of Gemma, whose files keep them minus one

losses.safetensors beside each holds ids [1, n] and the loss of every token after the first, in f32.
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CASES = {
    "patterns": ("llama", dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
        rank_pattern={r".*layers\.0.*(q|k)_proj": 3, "down_proj": 6},
        alpha_pattern={r"layers\.1\.mlp\..*": 9, "v_proj": 2})),
    "modules": ("llama_bias", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["lm_head", "model.norm"])),
    "tied": ("llama", dict(r=2, lora_alpha=4, target_modules=["v_proj"],
                           modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "own_head": ("llama", dict(r=2, lora_alpha=4, target_modules=["v_proj"],
                               modules_to_save=["lm_head"])),
    "norms": ("gemma3", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"],
        modules_to_save=["model.norm", "layers.1.self_attn.q_norm"])),
}


def make(golden, name):
    torch.manual_seed(7)
    base, config = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(golden / base, dtype=torch.float32,
                                                 attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.normal_(0, 0.15)
            elif value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    ids = torch.tensor([[i * 21 % 256 for i in range(40)]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    out = golden / name
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    written = json.loads((out / "adapter_config.json").read_text())
    for key in ("target_modules", "modules_to_save"):  # sets, in any order
        if isinstance(written[key], list):
            written[key].sort()
    written["base_model_name_or_path"] = base
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    save_file({"ids": ids, "losses": losses}, out / "losses.safetensors")


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        make(pathlib.Path(sys.argv[1]), name)
