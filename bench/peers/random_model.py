#!/usr/bin/env python3
"""A Llama of random weights as a GGUF file, for speeds that no small real model shows.

    bench/peers/random_model.py TOKENIZER.gguf OUT.gguf [--layers 4] [--type F16|Q8_0]

Width 2,048, 16 heads of 128 dimensions over 4 of keys, feed-forward 8,192: about 60 million weights
a layer. The tokenizer comes from another GGUF. llama-quantize makes the other types of an F16 file.
"""
import argparse

import gguf
import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, CONTEXT = 2048, 16, 4, 128, 8192, 16384


def copy_tokenizer(source, writer):
    for field in gguf.GGUFReader(source).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        value = field.contents()
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, value)
        else:
            writer.add_key_value(field.name, value, field.types[0])
        if field.name == "tokenizer.ggml.tokens":
            vocab = len(value)
    return vocab


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="GGUF file whose tokenizer is taken")
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", choices=("F16", "Q8_0"), default="F16")
    args = parser.parse_args()

    writer = gguf.GGUFWriter(args.out, "llama")
    vocab = copy_tokenizer(args.tokenizer, writer)
    writer.add_block_count(args.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)

    random = np.random.default_rng(1)
    kind = gguf.GGMLQuantizationType[args.type]

    def matrix(name, rows, cols):
        values = random.standard_normal((rows, cols), dtype=np.float32) / np.float32(cols**0.5)
        data = values.astype(np.float16) if args.type == "F16" else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd.weight", vocab, WIDTH)
    norm("output_norm.weight")
    for i in range(args.layers):
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, WIDTH)
        matrix(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, HEADS * HEAD_DIM)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_up.weight", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_down.weight", WIDTH, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
