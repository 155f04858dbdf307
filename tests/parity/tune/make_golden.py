"""Makes tests/golden/tune: tiny models with random weights, and what PEFT computes on them.

make_golden.py OUT [NAME...]   (torch, transformers, peft, tokenizers, safetensors)

optimizer.json: torch's AdamW on fixed gradients. schedules.json: transformers' schedules. Each folder is a
Hugging Face model whose weights are bf16 values, so that every precision reads the same numbers,
with:
  expected.safetensors   a LoRA adapter with random A and B, token ids, targets, documents' starts,
                         the logits' losses per token and the gradient of the mean loss by each
                         LoRA tensor
  trajectory.json        losses and gradient norms of 50 AdamW steps from the adapter in start/
  start/                 that adapter, as PEFT writes it
  merged_logits.safetensors  logits of the model with the adapter of step 50 merged in
Of qwen2 and qwen3 there are the gradients alone, at half the width. llama_wide and gemma3_wide, of
width 128, are for what is said about bf16: gradients and 50 steps, and in trajectory.json the loss
afterwards of ids that were not learnt. They learn so slowly that no step's rounding is blown up by
the next ones.
"""
import json
import math
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, get_scheduler)

VOCAB = 272


def tokenizer():
    """Byte-level BPE without merges: 256 bytes and a few control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)}
    merges = []
    for a, b in (("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("e", "r"), ("Ġ", "t")):
        vocab[a + b] = len(vocab)
        merges.append((a, b))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", chat_template=(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"))


SHAPE = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             attn_implementation="eager", dtype="float32", bos_token_id=263, eos_token_id=264)


def cases():
    yield "llama", LlamaForCausalLM(LlamaConfig(
        **{**SHAPE, "num_attention_heads": 3, "num_key_value_heads": 1}, head_dim=16,
        rope_theta=10000.0, tie_word_embeddings=True))
    yield "llama_bias", LlamaForCausalLM(LlamaConfig(
        **SHAPE, head_dim=16, rope_theta=500000.0, attention_bias=True, tie_word_embeddings=False))
    yield "gemma3", Gemma3ForCausalLM(Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 3}, head_dim=16, query_pre_attn_scalar=24,
        sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        hidden_activation="gelu_pytorch_tanh"))
    # Biases of q, k and v; norms of q and k in heads that together are wider than the model.
    small = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True}
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(
        **{**small, "num_attention_heads": 2, "num_key_value_heads": 1}, rope_theta=1000000.0))
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**small, head_dim=16, rope_theta=1000000.0))
    wide = {**SHAPE, "hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": True}
    yield "llama_wide", LlamaForCausalLM(LlamaConfig(**wide, head_dim=32, rope_theta=10000.0))
    yield "gemma3_wide", Gemma3ForCausalLM(Gemma3TextConfig(
        **wide, head_dim=32, query_pre_attn_scalar=24, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        hidden_activation="gelu_pytorch_tanh"))


GRADIENTS_ALONE = ("qwen2", "qwen3")


def randomise(model, generator, embedding=0.21):
    for name, p in model.named_parameters():
        scale = 0.9 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1
        if "embed" in name:
            scale = embedding
        values = torch.randn(p.shape, generator=generator) * scale
        if p.dim() == 1 and "norm" in name and "gemma" not in type(model).__name__.lower():
            values = 1 + values
        p.data = values.to(torch.bfloat16).float()


def documents(generator, lengths, share):
    docs = []
    for n in lengths:
        ids = torch.randint(0, 256, (n,), generator=generator)
        trained = torch.rand(n, generator=generator) < share
        trained[0] = False
        trained[-1] = True
        docs.append((ids, trained))
    return docs


def losses(model, ids, trained):
    logits = model(input_ids=ids[None]).logits[0].float()
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return torch.where(trained[1:], nll, torch.zeros_like(nll))


def with_adapter(model, targets, rank, alpha, generator, zero_b):
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets,
                                            task_type="CAUSAL_LM"))
    for name, p in peft.named_parameters():
        if not p.requires_grad:
            continue
        p.data = torch.randn(p.shape, generator=generator) * (0.3 / p.shape[1] ** 0.5)
        if zero_b and "lora_B" in name:
            p.data.zero_()
    return peft


def plain(name):
    return name.replace(".default.weight", ".weight")


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(out, name, model, seed):
    generator = torch.Generator().manual_seed(seed)
    folder = out / name
    wide = name.endswith("_wide")
    randomise(model, generator, 0.07 if wide else 0.21)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tok = tokenizer()
    tok.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")

    # Gradients.
    docs = documents(generator, [19, 7, 30, 2], 0.5)
    peft = with_adapter(model, ALL, 4, 6, generator, zero_b=False)
    peft.eval()
    per_token = [losses(peft, ids, trained) for ids, trained in docs]
    count = sum(int(t.sum()) for _, t in docs)
    (sum(l.sum() for l in per_token) / count).backward()
    tensors = {
        "ids": torch.cat([ids for ids, _ in docs]).int(),
        "trained": torch.cat([t for _, t in docs]).to(torch.int32),
        "lengths": torch.tensor([len(ids) for ids, _ in docs]).int(),
        # losses stand at the position that predicts
        "nll": torch.cat([torch.cat([l.detach(), torch.zeros(1)]) for l in per_token]),
    }
    for key, p in peft.named_parameters():
        if p.requires_grad:
            tensors["adapter." + plain(key)] = p.detach().contiguous()
            tensors["gradient." + plain(key)] = p.grad.contiguous()
    save_file(tensors, folder / "expected.safetensors", {"format": "pt", "alpha": "6"})
    peft.unload()
    if name in GRADIENTS_ALONE:
        return print(name, "loss", sum(float(l.sum()) for l in per_token) / count)

    # 50 steps on q, v and down alone, the same five sets of documents over and over.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    targets = ["q_proj", "v_proj", "down_proj"]
    peft = with_adapter(model, targets, 4, 8, generator, zero_b=True)
    peft.save_pretrained(folder / "start")
    for extra in (folder / "start").iterdir():
        if extra.name not in ("adapter_config.json", "adapter_model.safetensors"):
            extra.unlink()
    config = json.loads((folder / "start/adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (folder / "start/adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    trained = [p for p in peft.parameters() if p.requires_grad]
    lr, lengths = (2e-3, [71, 94, 66]) if wide else (5e-3, [11, 24, 6])
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
    sets = [documents(generator, [lengths[0] + i, *lengths[1:]], 0.6) for i in range(5)]
    steps = []
    for step in range(50):
        docs = sets[step % len(sets)]
        count = sum(int(t.sum()) for _, t in docs)
        loss = 0.0
        for ids, mask in docs:
            part = losses(peft, ids, mask).sum() / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss, "grad_norm": norm})
    ids = torch.arange(60) * 21 % 256
    after = losses(peft, ids, torch.ones(60, dtype=torch.bool)).mean().item()
    (folder / "trajectory.json").write_text(json.dumps(
        {**({"loss_afterwards": after} if wide else {}),
         "lr": lr, "weight_decay": 0.01, "max_grad_norm": 1.0, "steps": steps,
         "sets": [[{"ids": ids.tolist(), "trained": [int(t) for t in mask]}
                   for ids, mask in docs] for docs in sets]},
        separators=(",", ":")))

    if wide:
        return print(name, "first loss", steps[0]["loss"], "last", steps[-1]["loss"])

    # Adapter and base in one: what merging must compute.
    merged = peft.merge_and_unload()
    ids = torch.arange(12) * 21 % 256
    save_file({"ids": ids.int(), "logits": merged(input_ids=ids[None]).logits[0].detach()},
              folder / "merged_logits.safetensors", {"format": "pt"})
    print(name, "first loss", steps[0]["loss"], "last", steps[-1]["loss"])


def make_optimizer(out):
    """100 steps on gradients sin(0.1 t (i + 1)) · 10^(i mod 4 - 2), i from 0, t from 1."""
    p = torch.nn.Parameter(torch.tensor([(i - 8) / 4 for i in range(17)]))
    optimizer = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    for t in range(1, 101):
        p.grad = torch.tensor([math.sin(0.1 * t * (i + 1)) * 10.0 ** (i % 4 - 2)
                               for i in range(17)], dtype=torch.float64).float()
        optimizer.step()
    (out / "optimizer.json").write_text(json.dumps({"adamw": p.tolist()}, separators=(",", ":")))
    make_schedules(out)


def make_schedules(out):
    """110 steps of runs of 100: what a schedule does at its end, too."""
    wsd = "warmup_stable_decay"
    curves = []
    for name, warmup, kwargs in (
            ("linear", 7, {}), ("cosine", 7, {}), ("constant_with_warmup", 7, {}),
            ("cosine_with_min_lr", 7, {"min_lr_rate": 0.1}),
            ("cosine_with_restarts", 7, {}), ("cosine_with_restarts", 0, {"num_cycles": 3}),
            ("polynomial", 7, {}), ("polynomial", 0, {"lr_end": 1e-4, "power": 2.5}),
            ("inverse_sqrt", 7, {}), ("inverse_sqrt", 0, {}), ("inverse_sqrt", 7, {"timescale": 30}),
            (wsd, 7, {"num_decay_steps": 20}), (wsd, 0, {"num_decay_steps": 100}),
            (wsd, 7, {"num_decay_steps": 0}),
            (wsd, 7, {"num_decay_steps": 95, "decay_type": "linear"}),
            (wsd, 9, {"num_decay_steps": 30, "num_stable_steps": 40, "min_lr_ratio": 0.2,
                      "warmup_type": "cosine", "decay_type": "1-sqrt"}),
            (wsd, 9, {"num_decay_steps": 30, "warmup_type": "1-sqrt", "decay_type": "linear"})):
        o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
        s = get_scheduler(name, o, num_warmup_steps=warmup, num_training_steps=100,
                          scheduler_specific_kwargs=kwargs)
        factors = []
        for _ in range(110):
            factors.append(s.lr_lambdas[0](s.last_epoch))
            o.step()
            s.step()
        curves.append({"name": name, "warmup": warmup, "kwargs": kwargs, "factors": factors})
    (out / "schedules.json").write_text(json.dumps(curves, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    names = sys.argv[2:]
    if not names:
        make_optimizer(out)
    if "schedules" in names:
        make_schedules(out)
    for seed, (name, model) in enumerate(cases(), 1):
        if not names or name in names:
            make(out, name, model, seed)
