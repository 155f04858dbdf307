"""Drives a running `moru serve` with the `openai` package.

    python tests/parity/openai_client.py MORU MODEL

Starts the server on a free port, checks what a client sees, stops it by SIGTERM. Prints one line a
check and exits 0 if all hold. The package is looked for, and else installed into a folder of its own.
"""
import concurrent.futures
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

SKIPPED = 77


def openai_module(folder):
    try:
        return importlib.import_module("openai")
    except ImportError:
        pass
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                           "--target", folder, "openai"], capture_output=True, text=True)
    if done.returncode != 0:
        print("skipped: the openai package is not to be had")
        sys.exit(SKIPPED)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return importlib.import_module("openai")


def check(name, holds, shown=""):
    print(f"{'ok  ' if holds else 'FAIL'} {name} {shown}")
    if not holds:
        sys.exit(1)


def main():
    moru, model = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        openai = openai_module(folder)
        server = subprocess.Popen([moru, "serve", model, "--port", "0"], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
        try:
            port = None
            for line in server.stdout:
                found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
                if found:
                    port = found.group(1)
                    break
            check("the server says where it listens", port is not None)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            run(client, openai)
            server.send_signal(signal.SIGTERM)
            check("SIGTERM ends it cleanly", server.wait(timeout=60) == 0)
        finally:
            if server.poll() is None:
                server.kill()


def run(client, openai):
    name = client.models.list().data[0].id
    check("it lists its model", bool(name), name)

    def ask(text, **options):
        return client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": text}], max_tokens=24, **options)

    first = ask("What is the capital of France?", temperature=0)
    text = first.choices[0].message.content
    check("a chat is answered", bool(text) and first.usage.completion_tokens > 0, repr(text))
    check("greedy answers repeat", ask("What is the capital of France?", temperature=0)
          .choices[0].message.content == text)

    pieces, usage = [], None
    for chunk in ask("What is the capital of France?", temperature=0, stream=True,
                     stream_options={"include_usage": True}):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
        usage = chunk.usage or usage
    check("a stream has the same text", "".join(pieces) == text)
    check("a stream tells its usage", usage is not None and usage.completion_tokens == first.usage.completion_tokens)

    seeded = [ask("Tell me a story.", temperature=1.0, seed=s).choices[0].message.content for s in (1, 1, 2)]
    check("a seed repeats its answer", seeded[0] == seeded[1] and seeded[0] != seeded[2])

    stop = text.split()[1] if len(text.split()) > 1 else text[-1]
    stopped = ask("What is the capital of France?", temperature=0, stop=[stop])
    check("a stop text ends the answer", stopped.choices[0].message.content == text[:text.index(stop)]
          and stopped.choices[0].finish_reason == "stop")

    scored = ask("Hi", temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    check("log-probabilities are told", all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in scored))

    done = client.completions.create(model=name, prompt="The capital of France is", max_tokens=8, temperature=0)
    check("a text is completed", bool(done.choices[0].text), repr(done.choices[0].text))

    korean = "".join(c.choices[0].delta.content or "" for c in
                     ask("안녕하세요를 그대로 따라 쓰세요.", temperature=0, stream=True) if c.choices)
    check("a stream never splits a character", "\ufffd" not in korean, repr(korean))

    questions = [f"Write the number {i} in words." for i in range(8)]
    alone = [ask(q, temperature=0).choices[0].message.content for q in questions]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda q: ask(q, temperature=0).choices[0].message.content, questions))
    check("eight clients at once get the answers they get alone", alone == together)

    schema = {"type": "object", "properties": {
                  "city": {"type": "string", "maxLength": 20},
                  "people": {"type": "integer", "minimum": 0, "maximum": 99999999},
                  "kind": {"enum": ["capital", "town"]}},
              "required": ["city", "people", "kind"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    for temperature in (0, 1):
        held = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Tell me about Paris as JSON."}], max_tokens=120,
            temperature=temperature, seed=5, response_format=form).choices[0]
        value = json.loads(held.message.content)
        check("an answer is held to its schema", held.finish_reason == "stop" and list(value) == schema["required"]
              and len(value["city"]) <= 20 and 0 <= value["people"] <= 99999999 and value["kind"] in ("capital", "town"),
              held.message.content)
    held = ask("How many?", temperature=1, seed=1, extra_body={"guided_regex": "[0-9]{2} (cats|dogs)"})
    check("an answer is held to a regular expression",
          re.fullmatch("[0-9]{2} (cats|dogs)", held.choices[0].message.content), repr(held.choices[0].message.content))
    try:
        ask("x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})
        check("a schema that cannot be held to is refused", False)
    except openai.BadRequestError as error:
        check("a schema that cannot be held to is refused", "/not" in str(error), str(error)[:120])

    try:
        ask("x", temperature=9)
        check("a bad temperature is refused", False)
    except openai.BadRequestError as error:
        check("a bad temperature is refused", "temperature" in str(error), str(error)[:80])


if __name__ == "__main__":
    main()
