#!/usr/bin/env python3
"""Sentence chrF of sacreBLEU for pairs of texts, for tests/prove/chrf_test.cc.

Usage: expect_chrf.py > tests/golden/prove/chrf.json
"""
import json
import unicodedata

import sacrebleu

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat", "a dog ran away"),
    ("the cat is on the mat", "there is a cat on the mat"),
    ("card lost", "card_lost"),
    ("a", "b"),
    ("a", "abc"),
    ("abcdefgh", "abc"),
    ("", "abc"),
    ("aaaaaaaa", "aaa"),
    ("The refund takes five days.", "Refunds take up to 5 working days."),
    ("카드를 잃어버렸어요", "카드를 분실했어요"),
    ("서울은 대한민국의 수도이다.", "대한민국의 수도는 서울입니다."),
    ("환불은 5일 걸립니다", "환불 은 5 일 걸립니다"),
    ("東京は日本の首都です", "日本の首都は東京である"),
    ("naïve café", "naive cafe"),
    ("one\ttwo\n three", "one two three four"),
]

rows = []
for answer, reference in PAIRS:
    assert unicodedata.is_normalized("NFC", answer + reference)
    score = sacrebleu.sentence_chrf(answer, [reference]).score / 100
    rows.append({"answer": answer, "reference": reference, "chrf": score})
print(json.dumps({"sacrebleu": sacrebleu.__version__, "rows": rows}, ensure_ascii=False, indent=1))
