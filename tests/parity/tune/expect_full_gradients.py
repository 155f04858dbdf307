"""Makes tests/golden/tune/*/expected_full.safetensors: torch's gradients by every weight of the
tiny models, of the mean loss over the documents in expected.safetensors.

expect_full_gradients.py FOLDER...

A gradient G [rows, cols] is stored as what is left of it in two directions, G · sin(1 … cols) and
cos(1 … rows) · G, after each other: small, and no entry is lost.
"""
import pathlib
import re
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
PLAIN = {**PARTS, "post_attention_layernorm": "ffn_norm"}
SANDWICH = {**PARTS, "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}


def gguf_name(name, parts):
    if name in TOP:
        return TOP[name]
    layer, part, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name).groups()
    return f"blk.{layer}.{parts[part]}.{kind}"


torch.set_num_threads(1)
for folder in map(pathlib.Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    # torch drops the gradient of the padding token's row; here that row is a token like any other.
    model.get_input_embeddings().padding_idx = None
    data = load_file(folder / "expected.safetensors")
    ids = data["ids"].long().split(data["lengths"].tolist())
    trained = data["trained"].bool().split(data["lengths"].tolist())
    count = sum(int(t.sum()) for t in trained)
    for document, learnt in zip(ids, trained):
        logits = model(input_ids=document[None]).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="none")
        (nll[learnt[1:]].sum() / count).backward()
    parts = SANDWICH if "gemma" in type(model).__name__.lower() else PLAIN
    out = {}
    for name, p in model.named_parameters():
        g = p.grad.double().reshape(-1, p.shape[-1])
        rows, cols = g.shape
        left = torch.cos(torch.arange(1, rows + 1, dtype=torch.float64)) @ g
        right = g @ torch.sin(torch.arange(1, cols + 1, dtype=torch.float64))
        out["gradient." + gguf_name(name, parts)] = torch.cat([right, left]).float()
    save_file(out, folder / "expected_full.safetensors", {"format": "pt"})
    print(folder, len(out), "weights")
