#!/usr/bin/env python3
"""Make small sums, differences and dates with known answers: a task that rules can verify.

Usage: make_questions.py FOLDER [COUNT] [HELD_OUT]

Writes FOLDER/questions.jsonl (COUNT rows, to learn from) and FOLDER/held_out.jsonl (HELD_OUT rows,
to be judged by). No prompt stands in both.
"""
import json
import pathlib
import random
import sys

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]


def addition(rng):
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return f"What is {a} + {b}?", a + b, f"{a} + {b} = {a + b}"


def subtraction(rng):
    a, b = sorted((rng.randint(11, 99), rng.randint(11, 99)), reverse=True)
    return f"What is {a} - {b}?", a - b, f"{a} - {b} = {a - b}"


def date(rng):
    year, month, day = rng.randint(1900, 2049), rng.randint(1, 12), rng.randint(1, 28)
    iso = f"{year}-{month:02}-{day:02}"
    return f"Write {day} {MONTHS[month - 1]} {year} as YYYY-MM-DD.", iso, iso


KINDS = {"addition": addition, "subtraction": subtraction, "date": date}


def main():
    folder = pathlib.Path(sys.argv[1])
    counts = {"questions": int(sys.argv[2]) if len(sys.argv) > 2 else 480,
              "held_out": int(sys.argv[3]) if len(sys.argv) > 3 else 240}
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    seen = set()
    for name, count in counts.items():
        rows = []
        while len(rows) < count:
            category = list(KINDS)[len(rows) % len(KINDS)]
            prompt, answer, reference = KINDS[category](rng)
            if prompt in seen:
                continue
            seen.add(prompt)
            check = "contains" if category == "date" else "number"
            rows.append({"id": f"{category}-{len(rows)}", "prompt": prompt, "answer": answer,
                         "check": check, "category": category, "reference": reference})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


main()
