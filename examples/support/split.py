#!/usr/bin/env python3
"""Make pairs.jsonl and questions.jsonl from utterances/<intent>.txt.

    python3 split.py          check the utterances, write both files, print the counts
    python3 split.py --check  check the utterances and that both files are current

The split depends on nothing but the texts: an utterance's place is the sha256 of its NFC form.
In each intent the quarter with the lowest hashes are questions, the rest are pairs, and both
files are in the order of the hashes. So a line added to one intent can move a neighbour in that
intent, and changes no other. The rows keep the bytes as written, also those in NFD.
"""

import hashlib
import itertools
import json
import pathlib
import re
import sys
import unicodedata
from dataclasses import dataclass

HERE = pathlib.Path(__file__).resolve().parent
INTENT = re.compile(r"[a-z]+(_[a-z]+)*")
INTENTS_MIN = 26
UTTERANCES_MIN = 1300
PER_INTENT_MIN = 45
# Two texts that share more of their character 4-grams than this are one text reworded: with one
# in the pairs and one in the questions, a score would measure memory.
JACCARD_MAX = 0.6


@dataclass
class Utterance:
    intent: str
    where: str  # "utterances/sim_swap.txt:12"
    text: str  # as written
    nfc: str
    language: str

    @property
    def order(self):
        return hashlib.sha256(self.nfc.encode()).hexdigest()


def language_of(nfc):
    """ko, en, or mixed when both scripts stand in one text ("eSIM 개통")."""
    hangul = re.search(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]", nfc)
    latin = re.search(r"[A-Za-z]", nfc)
    return "mixed" if hangul and latin else "ko" if hangul else "en" if latin else "none"


def letters_of(nfc):
    return "".join(c for c in nfc.lower() if c.isalpha())


def grams_of(letters):
    return {letters[i : i + 4] for i in range(max(1, len(letters) - 3))}


def read_utterances():
    utterances = []
    for path in sorted((HERE / "utterances").glob("*.txt")):
        # Not splitlines(): it also splits at characters that are legal inside a line.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip() or line.startswith("#"):
                continue
            nfc = unicodedata.normalize("NFC", line)
            where = f"utterances/{path.name}:{number}"
            utterances.append(Utterance(path.stem, where, line, nfc, language_of(nfc)))
    return utterances


def by_intent(utterances):
    groups = {}
    for u in utterances:
        groups.setdefault(u.intent, []).append(u)
    return groups


def find_problems(utterances):
    """Everything that makes the set unfit, as sentences; none when it is fit."""
    groups = by_intent(utterances)
    if len(groups) < INTENTS_MIN:
        yield f"{len(groups)} intents, at least {INTENTS_MIN} are needed"
    if len(utterances) < UTTERANCES_MIN:
        yield f"{len(utterances)} utterances, at least {UTTERANCES_MIN} are needed"
    for intent, group in groups.items():
        if not INTENT.fullmatch(intent):
            yield f"utterances/{intent}.txt: the file's name is not a snake_case label"
        if len(group) < PER_INTENT_MIN:
            yield f"{intent}: {len(group)} utterances, at least {PER_INTENT_MIN} are needed"

    seen_letters, seen_frames = {}, {}
    for u in utterances:
        if u.text != u.text.strip():
            yield f"{u.where}: spaces at an end"
        if u.language == "none":
            yield f"{u.where}: neither Hangul nor Latin letters"
        first = seen_letters.setdefault(letters_of(u.nfc), u)
        if first is not u:
            yield f"{u.where}: same letters as {first.where}"
        words = [letters_of(w) for w in u.nfc.split()]
        for i in range(len(words) if len(words) >= 3 else 0):
            frame = (*words[:i], None, *words[i + 1 :])
            first = seen_frames.setdefault(frame, u)
            if first is not u:
                yield f"{u.where}: one word apart from {first.where}: {u.text}"

    grams = [(u, grams_of(letters_of(u.nfc))) for u in utterances]
    for (a, grams_a), (b, grams_b) in itertools.combinations(grams, 2):
        shared = len(grams_a & grams_b)
        jaccard = shared / (len(grams_a) + len(grams_b) - shared)
        if jaccard > JACCARD_MAX:
            yield f"{b.where}: shares {jaccard:.2f} of its 4-grams with {a.where}: {b.text}"


def split(utterances):
    pairs, questions = [], []
    for group in by_intent(utterances).values():
        group = sorted(group, key=lambda u: u.order)
        quarter = (len(group) + 2) // 4  # rounded to the nearest
        questions += group[:quarter]
        pairs += group[quarter:]
    return sorted(pairs, key=lambda u: u.order), sorted(questions, key=lambda u: u.order)


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def print_counts(utterances, pairs, questions):
    print("| intent | ko | en | mixed | all | pairs | questions |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    rows = [(f"`{intent}`", lambda u, i=intent: u.intent == i) for intent in by_intent(utterances)]
    for name, chosen in [*rows, ("**all**", lambda u: True)]:
        languages = [u.language for u in utterances if chosen(u)]
        counts = [languages.count(x) for x in ("ko", "en", "mixed")]
        counts += [len(languages), sum(map(chosen, pairs)), sum(map(chosen, questions))]
        print(f"| {name} | " + " | ".join(map(str, counts)) + " |")


def main():
    utterances = read_utterances()
    problems = list(find_problems(utterances))
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} problems: nothing was written"]))
    pairs, questions = split(utterances)
    outputs = {
        "pairs.jsonl": to_jsonl({"prompt": u.text, "completion": u.intent} for u in pairs),
        "questions.jsonl": to_jsonl(
            {"prompt": u.text, "answer": u.intent, "check": "exact"} for u in questions
        ),
    }
    for name, content in outputs.items():
        path = HERE / name
        if sys.argv[1:] == ["--check"]:
            if not path.exists() or path.read_bytes() != content.encode():
                sys.exit(f"{name} is not what the utterances give: run split.py")
        else:
            path.write_bytes(content.encode())
    print_counts(utterances, pairs, questions)


if __name__ == "__main__":
    main()
