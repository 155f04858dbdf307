"""Checks that what moru learns of a conversation is what TRL learns of it: run by hand.

check_masks.py MORU PEERS   (trl, transformers, torch; the tokenizer of a model in PEERS/models)

TRL has, of some chat templates, versions that mark what an assistant generates. A tiny model with
such a template as its makers wrote it shows its examples (moru tune --check); their ids and masks
have to be those of TRL's version, apart from two differences, which are counted:
  before   TRL learns text that the template puts in front of every answer (Qwen2.5's line end after
           "assistant"); moru asks the model with it, so it is not learnt
  after    TRL learns what follows the end of a turn (a line end); moru does not, and the last one is
           no part of the example
An answer is tokenized apart from its prompt, as it is when it is served; TRL tokenizes them together.
Of examples of more than 128 tokens moru lists 64 from either end; their counts are compared too.
Templates that rewrite earlier turns are asked single turns, as moru makes an example of each.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import trl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = pathlib.Path(trl.__file__).parent / "chat_templates"

# name, the token that ends a turn, what the template can do
CASES = [("llama3", "<|eot_id|>", "system turns"), ("qwen2_5", "<|im_end|>", "system turns tools"),
         ("qwen3", "<|im_end|>", "system think"),
         ("qwen3_instruct_2507", "<|im_end|>", "system turns tools"),
         ("gemma", "<end_of_turn>", "turns"), ("gemma3", "<end_of_turn>", "system turns")]

USER, ANSWER = {"role": "user", "content": "몇 시야? <b>"}, {"role": "assistant", "content": "3시. ok"}
SYSTEM = {"role": "system", "content": "Be short."}
TOOLS = [{"type": "function", "function": {"name": "now", "description": "time", "parameters": {
    "type": "object", "properties": {"zone": {"type": "string"}}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "now", "arguments": {"zone": "KST"}}}]}
RESULT = {"role": "tool", "content": "15:00"}
ROWS = {
    "": {"messages": [USER, ANSWER]},
    "system": {"messages": [SYSTEM, USER, ANSWER]},
    "turns": {"messages": [USER, ANSWER, {"role": "user", "content": "And now?"},
                           {"role": "assistant", "content": "  4.\n"}]},
    "think": {"messages": [USER, {"role": "assistant",
                                  "content": "<think>\nlook\n</think>\n\n3시."}]},
    "tools": {"messages": [USER, CALL, RESULT, ANSWER], "tools": TOOLS},
}


def example(moru, folder, row):
    """Ids, mask and both counts of the row's only example; null where ids are left out."""
    (folder / "row.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    done = subprocess.run([moru, "tune", folder, folder / "row.jsonl", "--check", "1"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    told = re.search(r"(\d+) tokens, (\d+)\s+learnt", done.stdout)
    ids = re.search(r"^ids((?:\s+(?:\[?\d+\]?|…))+)", done.stdout, re.M)
    assert told and ids, done.stdout + done.stderr
    shown = ids.group(1).split()
    count, learnt = int(told.group(1)), int(told.group(2))
    if "…" in shown:
        at = shown.index("…")
        shown[at:at + 1] = [None] * (count - len(shown) + 1)
    assert len(shown) == count
    return ([s and int(s.strip("[]")) for s in shown], [s and int(s[0] == "[") for s in shown],
            learnt)


def wanted(tokenizer, stock, training, row, end):
    """Ids and mask of TRL's text, less what is learnt before and after; how many answers have each."""
    tools = row.get("tools")
    texts, spans = render_jinja_template([row["messages"]], tools=tools,
                                         chat_template=training, return_assistant_tokens_mask=True,
                                         **tokenizer.special_tokens_map)
    text = texts[0]
    cuts, learnt = [0], []
    for i, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(row["messages"][:i], tools=tools, tokenize=False,
                                              chat_template=stock, add_generation_prompt=True)
        assert text.startswith(asked)
        cuts.append(len(asked))
        learnt.append((len(asked), text.index(end, len(asked)) + len(end)))
    ids, mask = [], []
    # The prompt and each answer are tokenized as they are served: apart.
    for first, last in zip(cuts, [*cuts[1:], learnt[-1][1]]):
        piece = tokenizer(text[first:last], add_special_tokens=False, return_offsets_mapping=True)
        for token, (begin, stop) in zip(piece["input_ids"], piece["offset_mapping"]):
            begin, stop = begin + first, max(stop, begin + 1) + first
            ids.append(token)
            mask.append(int(all(any(a <= begin and stop <= b for a, b in both)
                                for both in (spans[0], learnt))))
    assert len(spans[0]) == len(learnt)
    before = sum(text[a:c] != "" for (a, _), (c, _) in zip(spans[0], learnt))
    after = sum(text[d:b] != "" for (_, b), (_, d) in zip(spans[0], learnt))
    return ids, mask, before, after


def main(moru, peers):
    folder = pathlib.Path(tempfile.mkdtemp())
    failed = False
    for name, end, can in CASES:
        stock = (TEMPLATES / f"{name}.jinja").read_text()
        training = (TEMPLATES / f"{name}_training.jinja").read_text()
        tokenizer = AutoTokenizer.from_pretrained(peers / "models/SmolLM2-135M-Instruct.Q4_1-hf")
        marks = sorted(set(re.findall(r"<\|[^|>'\s]+\|>|</?[a-z_]+_turn>", stock)) | {end})
        tokenizer.add_special_tokens({"eos_token": end, "bos_token": "<|the_first|>",
                                      "additional_special_tokens": marks})
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.chat_template = stock
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for kind in ["", *can.split()]:
            row = ROWS[kind]
            ids, mask, learnt = example(moru, folder, row)
            want_ids, want_mask, before, after = wanted(tokenizer, stock, training, row, end)
            same = (len(ids) == len(want_ids) and learnt == sum(want_mask) > 0 and
                    all(a is None or (a, b) == c
                        for a, b, c in zip(ids, mask, zip(want_ids, want_mask))))
            failed |= not same
            print(f"{name:20} {kind or 'plain':7} {len(ids):4} tokens {learnt:3} learnt "
                  f"{'equal' if same else 'OTHERWISE'}; TRL besides: {before} before, {after} after")
            if not same:
                print("  moru", ids, mask, learnt, "\n  TRL ", want_ids, want_mask, sum(want_mask))
    sys.exit(failed)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
