#!/usr/bin/env python3
"""Grade-school word problems (GSM8K, MIT) as moru's questions: a task that rules can verify.

Usage: make_questions.py GSM8K FOLDER [SOLVED] [COUNT] [HELD_OUT]

GSM8K holds train.jsonl and test.jsonl of github.com/openai/grade-school-math. Writes to FOLDER
  solved.jsonl     SOLVED training rows with their worked solutions, for `moru tune`
  questions.jsonl  COUNT other training rows, for `moru pairs` and `moru improve`
  held_out.jsonl   HELD_OUT rows of the test file, for `moru gate`
The calculator's notes (<<48/2=24>>) are taken out of the solutions; the last line is "#### 24".
"""
import json
import pathlib
import random
import re
import sys


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(7).shuffle(rows)
    return rows


def question(row):
    solution = re.sub(r"<<.*?>>", "", row["answer"]).strip()
    return {"prompt": row["question"], "answer": solution.split("#### ")[-1].replace(",", ""),
            "check": "number", "reference": solution}


def main():
    source, folder = map(pathlib.Path, sys.argv[1:3])
    solved, count, held_out = [int(n) for n in sys.argv[3:6]] + [1500, 100, 300][len(sys.argv) - 3:]
    train, test = rows_of(source / "train.jsonl"), rows_of(source / "test.jsonl")
    files = {"solved": [{"prompt": q["prompt"], "completion": q["reference"]}
                        for q in map(question, train[:solved])],
             "questions": list(map(question, train[solved:solved + count])),
             "held_out": list(map(question, test[:held_out]))}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


main()
