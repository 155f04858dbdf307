"""Checks that others read what `moru adapter` writes: run by hand.

check_exports.py MORU PEERS   (torch, transformers, peft, safetensors; llama.cpp in PEERS/bin)

A random rank-stabilised adapter of SmolLM2-135M-Instruct goes through moru into
  peft           loaded by PEFT: logits equal those of the adapter that went in
  hf             merged, from the GGUF base: transformers' logits equal PEFT's on the same weights,
                 the tokenizer's ids equal the original's
  gguf-adapter   llama-completion --lora on the GGUF base answers as on moru's merged GGUF
and adapters with DoRA, with whole modules and with a head of its own through peft and hf likewise.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["The capital of Korea is", "안녕하세요, 반갑습니다. 1234", "def f(x):\n    return x",
         "  two  spaces\n\n and <|im_start|>user\nhi<|im_end|>"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def main(moru, peers):
    hf = peers / "models/SmolLM2-135M-Instruct.Q4_1-hf"
    gguf = peers / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(3)
    work = pathlib.Path(tempfile.mkdtemp())

    model = get_peft_model(load(hf), LoraConfig(r=8, lora_alpha=16, use_rslora=True,
                                                target_modules="all-linear",
                                                rank_pattern={"v_proj": 4},
                                                alpha_pattern={"down_proj": 8}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.02)
    model.save_pretrained(work / "in")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = tokenizer(TEXTS[0] + TEXTS[1], return_tensors="pt").input_ids
    expected, base = logits(model, ids), logits(load(hf), ids)
    print(f"the adapter changes logits by up to {(expected - base).abs().max():.3f}")

    def run(to, out, *more):
        subprocess.run([moru, "adapter", gguf, work / "in", "-o", work / out, "--to", to, *more],
                       check=True, stdout=subprocess.DEVNULL)

    run("peft", "peft")
    again = logits(PeftModel.from_pretrained(load(hf), work / "peft"), ids)
    print(f"peft: max difference of logits {(again - expected).abs().max():.2e}")

    run("hf", "hf", "--type", "f32", "--shard-mb", "100")
    shards = len(list((work / "hf").glob("*.safetensors")))
    merged = logits(load(work / "hf"), ids)
    print(f"hf: {shards} shards, max difference of logits {(merged - expected).abs().max():.2e}")
    written = AutoTokenizer.from_pretrained(work / "hf")
    for text in TEXTS:
        assert written(text).input_ids == tokenizer(text).input_ids, text
        assert written.decode(written(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    chat = [{"role": "user", "content": "hi"}]
    assert (written.apply_chat_template(chat, add_generation_prompt=True)
            == tokenizer.apply_chat_template(chat, add_generation_prompt=True))
    print("hf: tokens and chat template are equal; generation_config",
          json.loads((work / "hf/generation_config.json").read_text()))

    others = {
        "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear"),
        "modules": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                              modules_to_save=["embed_tokens", "model.norm"],
                              ensure_weight_tying=True),
        "head": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"],
                           modules_to_save=["lm_head"])}
    for name, config in others.items():
        model = get_peft_model(load(hf), config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(1 + 0.1 * torch.randn_like(value))
                elif "lora_" in key:
                    value.normal_(0, 0.03)
                elif value.requires_grad:
                    value.add_(0.02 * torch.randn_like(value))
        model.save_pretrained(work / name)
        wanted = logits(model, ids)
        print(f"{name} changes logits by up to {(wanted - base).abs().max():.3f}")
        for to, more in (("peft", ()), ("hf", ("--type", "f32"))):
            out = work / f"{name}-{to}"
            subprocess.run([moru, "adapter", gguf, work / name, "-o", out, "--to", to, *more],
                           check=True, stdout=subprocess.DEVNULL)
            model = PeftModel.from_pretrained(load(hf), out) if to == "peft" else load(out)
            difference = (logits(model, ids) - wanted).abs().max()
            print(f"{name} {to}: max difference of logits {difference:.2e}")

    run("gguf-adapter", "adapter.gguf")
    run("gguf", "merged.gguf", "--type", "f32")
    flags = ["-p", TEXTS[0], "-n", "48", "--temp", "0", "-no-cnv", "--no-warmup", "-t", "2",
             "--no-display-prompt"]

    def complete(*more):
        done = subprocess.run([peers / "bin/llama-completion", *more, *flags], check=True,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return done.stdout.strip()

    # Both on f32 weights: rounding of the base is not what is compared.
    plain = work / "plain.gguf"
    zero = work / "zero"
    for_zero = get_peft_model(load(hf), LoraConfig(r=1, target_modules=["q_proj"]))
    for_zero.save_pretrained(zero)
    subprocess.run([moru, "adapter", gguf, zero, "-o", plain, "--to", "gguf", "--type", "f32"],
                   check=True, stdout=subprocess.DEVNULL)
    with_adapter = complete("-m", plain, "--lora", work / "adapter.gguf")
    print("gguf-adapter: --lora answers", "the same" if with_adapter == complete(
        "-m", work / "merged.gguf") else "OTHERWISE", "as the merged model;",
        "the base", "the same" if complete("-m", plain) == with_adapter else "otherwise")
    print("  ", repr(with_adapter[:120]))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
