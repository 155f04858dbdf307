"""Makes tests/golden/tune/*/dora: a DoRA adapter as PEFT writes it, with random A, B and magnitudes,
and beside it in expected_dora.safetensors what PEFT computes with it on the documents of
expected.safetensors: the loss of every token, and the gradient of their mean by each tensor.

expect_dora.py FOLDER...   (torch, transformers, peft, safetensors)
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain(name):
    """As in the files PEFT writes."""
    return name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(
        ".default.weight", ".weight")


torch.set_num_threads(1)
for folder in map(pathlib.Path, sys.argv[1:]):
    generator = torch.Generator().manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(
        r=3, lora_alpha=5, use_dora=True, use_rslora="gemma" in folder.name,
        target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_magnitude" in name:
            p.data *= 0.8 + 0.4 * torch.rand(p.shape, generator=generator)
        elif p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * (0.5 / p.shape[1] ** 0.5)
    model.save_pretrained(folder / "dora")
    (folder / "dora/README.md").unlink()
    config = json.loads((folder / "dora/adapter_config.json").read_text())
    config.update(base_model_name_or_path=folder.name, target_modules=sorted(TARGETS))
    (folder / "dora/adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))

    data = load_file(folder / "expected.safetensors")
    ids = data["ids"].long().split(data["lengths"].tolist())
    trained = data["trained"].bool().split(data["lengths"].tolist())
    count = sum(int(t.sum()) for t in trained)
    every = []
    for document, learnt in zip(ids, trained):
        logits = model(input_ids=document[None]).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")
        nll = torch.where(learnt[1:], nll, torch.zeros_like(nll))
        (nll.sum() / count).backward()
        every.append(torch.cat([nll.detach(), torch.zeros(1)]))
    out = {plain(name): p.grad.contiguous() for name, p in model.named_parameters()
           if p.requires_grad}
    save_file({"nll": torch.cat(every), **out}, folder / "expected_dora.safetensors",
              {"format": "pt"})
    print(folder, len(out), "tensors")
