#!/usr/bin/env python3
"""Golden outputs of chat templates, as transformers renders them.

Two files come out of it, both read by tests/formats/chat_template_test.cc:

  tests/golden/jinja.json           what small templates written for the test render to
  tests/golden/chat_templates.json  for real models' templates, by the SHA-256 of the template: the
                                    first digits of the SHA-256 of what each conversation of
                                    chat_conversations.json, in its order, renders to; null where
                                    it is refused

Real templates are other people's text and stay out of the repository. They are looked for below
MORU_PEERS (~/.cache/moru-peers) and below each folder of MORU_TEMPLATES, separated by colons:
*.jinja, and the chat_template of tokenizer_config.json and chat_template.json. Entries of templates
that are not found are kept.

  python tests/parity/expect_chat_templates.py
"""

import datetime
import hashlib
import json
import os
import pathlib
import time

os.environ["TZ"] = "UTC"
time.tzset()

from transformers.utils import chat_template_utils  # noqa: E402

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


class Noon(datetime.datetime):
    """The clock of the golden outputs; chat_template_test.cc sets the same."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 31, 12, 0)


chat_template_utils.datetime = Noon


def sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def folders():
    yield pathlib.Path(os.environ.get("MORU_PEERS", pathlib.Path.home() / ".cache/moru-peers"))
    for folder in os.environ.get("MORU_TEMPLATES", "").split(":"):
        if folder:
            yield pathlib.Path(folder)


def find_templates():
    """Template text by its SHA-256, and where it was found."""
    found = {}

    def add(source, where):
        if isinstance(source, str):
            found.setdefault(sha256(source), (source, where))

    for folder in folders():
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(".py.jinja"):
                continue  # a compiler's, not a model's
            if path.suffix == ".jinja":
                add(path.read_bytes().decode("utf-8"), path)
            elif path.name in ("tokenizer_config.json", "chat_template.json"):
                source = json.loads(path.read_bytes()).get("chat_template")
                for item in source if isinstance(source, list) else [{"template": source}]:
                    add(item["template"], path)
    return found


def render(source, conversation):
    outputs, _ = chat_template_utils.render_jinja_template(
        conversations=[conversation["messages"]],
        tools=conversation.get("tools"),
        chat_template=source,
        add_generation_prompt=conversation.get("add_generation_prompt", False),
        bos_token="<s>",
        eos_token="</s>",
        **conversation.get("extra", {}),
    )
    return outputs[0]


def update_real_templates():
    text = (GOLDEN / "chat_conversations.json").read_text("utf-8")
    conversations = json.loads(text)
    path = GOLDEN / "chat_templates.json"
    golden = json.loads(path.read_text("utf-8")) if path.exists() else {}
    templates = golden.get("templates", {}) if golden.get("conversations") == sha256(text) else {}
    rendered = refused = 0
    for key, (source, where) in find_templates().items():
        outputs = []
        for conversation in conversations.values():
            try:
                outputs.append(sha256(render(source, conversation))[:12])
                rendered += 1
            except Exception:  # whatever a template can throw is a refusal
                outputs.append(None)
                refused += 1
        if not any(outputs):
            print("renders nothing:", where)
        templates[key] = outputs
    # One template a line, so that a difference shows what changed.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(templates[key])}" for key in sorted(templates))
    path.write_text(
        '{"conversations": "' + sha256(text) + '",\n"templates": {\n' + lines + "\n}}\n", "utf-8"
    )
    print(f"{len(templates)} templates, {rendered} outputs, {refused} refusals")


def update_small_templates():
    path = GOLDEN / "jinja.json"
    golden = json.loads(path.read_text("utf-8"))
    variables = golden["variables"]
    refused = 0
    for case in golden["cases"]:
        try:
            template = chat_template_utils._compile_jinja_template(case["template"])
            case["output"] = template.render(
                tools=None, documents=None, add_generation_prompt=False, **variables
            )
        except Exception:
            case["output"] = None
            refused += 1
    cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in golden["cases"])
    path.write_text(
        '{"variables": ' + json.dumps(variables, ensure_ascii=False) + ',\n"cases": [\n' + cases
        + "\n]}\n",
        encoding="utf-8",
    )
    print(f"{len(golden['cases'])} small templates, {refused} refusals")


if __name__ == "__main__":
    update_small_templates()
    update_real_templates()
