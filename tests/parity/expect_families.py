"""Expected f32 logits of a tiny random model of every family, by transformers.

    python tests/parity/expect_families.py tests/golden/families [NAME…]

For each family: its config.json, the names and shapes of the tensors that transformers writes, and
for three prompts with a greedy continuation of 40 tokens the logits of four vocabulary entries at
every position. No weight is stored: element i of a tensor is a formula of the tensor's name and i
(weights()), which tests/lighten/families_test.cc computes as well.
"""
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file

VOCAB = 288
CONTINUATION = 40
COLUMNS = 4
PROMPTS = [5, 13, 22]  # tokens: shorter and longer than the windows of 8


def splitmix64(x):
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def fnv1a(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def weights(name, shape):
    """u = the top 8 bits of splitmix64(fnv1a(name) + i); value = (2u - 255) / 256 · 2^-s, plus 1 for
    gains of norms. Matrices: s = (floor(log2(columns)) - 1) / 2, embeddings 0, everything else 2."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        u = splitmix64(np.uint64(fnv1a(name)) + np.arange(count, dtype=np.uint64)) >> np.uint64(56)
    values = (2 * u.astype(np.float32) - 255) / 256
    shift = 2
    if "embed" in name:
        shift = 0
    elif len(shape) > 1 and "bias" not in name:
        shift = (int(shape[-1]).bit_length() - 2) // 2
    values = values * np.float32(2.0**-shift)
    if "norm" in name:
        values = values + np.float32(1)
    return torch.from_numpy(values.reshape(shape))


BASE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)


def cases():
    def case(config, **keys):
        return config(**{**BASE, **keys})
    yield "llama3", case(tf.LlamaConfig, head_dim=32, tie_word_embeddings=True, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64})
    yield "llama_bias", case(tf.LlamaConfig, attention_bias=True, rope_theta=1e6)
    yield "mistral", case(tf.MistralConfig, head_dim=32, sliding_window=8)
    yield "mistral_nemo", case(tf.MistralConfig, head_dim=48, sliding_window=None, rope_theta=1e6)
    yield "qwen2", case(tf.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=2,
                        rope_theta=1e6, tie_word_embeddings=True)
    yield "qwen2_yarn", case(tf.Qwen2Config, max_position_embeddings=256, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64})
    yield "qwen3", case(tf.Qwen3Config, head_dim=32, rope_theta=1e6)
    yield "gemma", case(tf.GemmaConfig, head_dim=32, tie_word_embeddings=True)
    yield "gemma2", case(tf.Gemma2Config, head_dim=32, sliding_window=8, query_pre_attn_scalar=24,
                         attn_logit_softcapping=5.0, final_logit_softcapping=3.0, tie_word_embeddings=True)
    yield "gemma3", case(tf.Gemma3TextConfig, num_hidden_layers=7, head_dim=32, sliding_window=8,
                         query_pre_attn_scalar=24, tie_word_embeddings=True, rope_parameters={
                             "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})
    yield "phi3", case(tf.Phi3Config, sliding_window=8)
    yield "phi3_longrope", case(
        tf.Phi3Config, hidden_size=128, sliding_window=None, max_position_embeddings=256,
        original_max_position_embeddings=32, rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 32, "short_factor": [1 + i / 16 for i in range(12)],
            "long_factor": [1 + i / 2 for i in range(12)]})
    yield "granite", case(tf.GraniteConfig, embedding_multiplier=3.0, residual_multiplier=0.5,
                          attention_multiplier=0.125, logits_scaling=4.0, tie_word_embeddings=True)
    yield "hyperclovax", case(tf.HyperCLOVAXConfig, head_dim=32, attention_bias=True,
                              embedding_multiplier=3.0, residual_multiplier=0.5,
                              attention_multiplier=0.125, logits_scaling=0.25)
    yield "hyperclovax_pre", case(tf.HyperCLOVAXConfig, use_post_norm=False)
    yield "command_r", case(tf.CohereConfig, logit_scale=0.25, rope_theta=8e6,
                            tie_word_embeddings=True)
    yield "cohere2", case(tf.Cohere2Config, num_hidden_layers=5, sliding_window=8, logit_scale=0.25,
                          layer_norm_eps=1e-5, tie_word_embeddings=True)
    yield "olmo2", case(tf.Olmo2Config, rope_theta=500000.0)
    yield "smollm3", case(tf.SmolLM3Config, num_hidden_layers=5, no_rope_layer_interval=4,
                          rope_theta=2e6, tie_word_embeddings=True)
    yield "exaone4", case(tf.Exaone4Config, num_hidden_layers=5, sliding_window=8, rope_theta=1e6)
    yield "exaone4_full", case(tf.Exaone4Config, sliding_window=None, sliding_window_pattern=None,
                               layer_types=["full_attention"] * 4, tie_word_embeddings=True)
    yield "hunyuan", case(tf.HunYuanDenseV1Config, head_dim=32, tie_word_embeddings=True, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0})
    yield "mixtral", case(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2,
                          sliding_window=None, rope_theta=1e6)
    yield "qwen2moe", case(tf.Qwen2MoeConfig, num_experts=6, num_experts_per_tok=3,
                           moe_intermediate_size=64, shared_expert_intermediate_size=96,
                           rope_theta=1e6, norm_topk_prob=False)
    yield "qwen3moe", case(tf.Qwen3MoeConfig, head_dim=32, num_experts=8, num_experts_per_tok=2,
                           moe_intermediate_size=64, norm_topk_prob=True, rope_theta=1e6)
    yield "qwen3moe_sparse", case(tf.Qwen3MoeConfig, num_experts=8, num_experts_per_tok=2,
                                  moe_intermediate_size=64, norm_topk_prob=False,
                                  decoder_sparse_step=2, mlp_only_layers=[3])
    yield "gptoss", case(tf.GptOssConfig, head_dim=32, intermediate_size=64, num_local_experts=4,
                         num_experts_per_tok=2, sliding_window=8, max_position_embeddings=256,
                         rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0,
                                          "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                          "original_max_position_embeddings": 64})


def plain_names(folder):
    """Makes every tensor of the folder weights() of its name, in f32."""
    path = folder / "model.safetensors"
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensors[name] = weights(name, list(file.get_slice(name).get_shape())).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return {name: list(t.shape) for name, t in tensors.items()}


def make(out, name, config):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        config._attn_implementation = "eager"
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        tensors = plain_names(folder)
        model = tf.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
        written = json.loads((folder / "config.json").read_text())
    written.pop("transformers_version", None)
    cases = []
    for count in PROMPTS:
        ids = torch.tensor([[(count * 31 + i * 97) % 250 + 3 for i in range(count)]])
        with torch.no_grad():
            for _ in range(CONTINUATION):
                step = model(ids, use_cache=False).logits[0, -1]
                ids = torch.cat([ids, step.argmax()[None, None]], 1)
            logits = model(ids, use_cache=False).logits[0]
        rows = [[round(float(logits[at, (at * 61 + k * 71) % VOCAB]), 6) for k in range(COLUMNS)]
                for at in range(logits.shape[0])]
        cases.append({"prompt_tokens": count, "ids": ids[0].tolist(), "logits": rows})
    flat = [abs(v) for c in cases for row in c["logits"] for v in row]
    print(f"{name}: {len(tensors)} tensors, mean |logit| {sum(flat) / len(flat):.3f}")
    lines = ['{"config": ' + json.dumps(written, sort_keys=True),
             '"tensors": ' + json.dumps(tensors, separators=(",", ":")),
             '"cases": [\n' + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "]}\n"]
    (out / f"{name}.json").write_text(",\n".join(lines))


def main():
    torch.set_num_threads(1)
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, config in cases():
        if len(sys.argv) == 2 or name in sys.argv[2:]:
            make(out, name, config)


main()
