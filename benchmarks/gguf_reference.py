"""What llama.cpp continues SmolLM2 with: `python benchmarks/gguf_reference.py MODEL.gguf --json REFERENCE.json`.

Twenty prompts (prose, code, questions, chats), continued greedily by llama.cpp (`pip install llama-cpp-python`), whose
tokens danlu's tests compare theirs with. Twice: from the file as it is, where llama.cpp rounds activations to 8 bits in
front of every product with 4-bit weights, and from the same weights as `danlu convert ... --dtype f32` writes them,
where it does not. danlu, in fp32, continues them too.

A table tells how many of the twenty agree, and how many llama.cpp continues as itself when it sums in another order:
rounding to 8 bits makes a large step of the smallest difference. So twenty more prompts are recorded from the 4-bit
file: the first of a list on which llama.cpp does agree with itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from danlu.engine.generate import generate_tokens
from danlu.engine.sampling import SamplingParams
from danlu.models.causal_lm import CausalLM
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer

TOKENS = 48
TWENTY = 20
SETTINGS = {"n_ctx": 512, "n_batch": 512, "n_threads": 1, "flash_attn": False, "type_k": 0, "type_v": 0}
"""Of llama.cpp: one thread, so that sums have one order, and keys and values kept in fp32 (type 0)."""

PROMPTS: list[str | list[dict[str, str]]] = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at a lower temperature on a mountain because",
    "The three most important inventions of the nineteenth century were",
    "To bake a loaf of bread, you first",
    "In the year 1969, two astronauts",
    "The difference between a virus and a bacterium is that",
    "Photosynthesis is the process by which",
    "Dear Ms. Alvarez,\n\nThank you for your letter of",
    "Q: How many legs does a spider have?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "import json\n\n\ndef read_config(path):\n    with open(path) as file:\n",
    "SELECT name, COUNT(*) FROM orders\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "<ul>\n  <li>apples</li>\n  <li>",
    [{"role": "user", "content": "What is the capital of Japan?"}],
    [{"role": "user", "content": "Write a haiku about rain."}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [
        {"role": "user", "content": "My name is Lin."},
        {"role": "assistant", "content": "Nice to meet you, Lin!"},
        {"role": "user", "content": "What is my name?"},
    ],
]


# Continued with little doubt: of these the first twenty count on which llama.cpp agrees with itself (see `steady`).
STEADY = [
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "2, 4, 6, 8, 10, 12,",
    "10, 20, 30, 40, 50,",
    "5, 10, 15, 20, 25, 30,",
    "100, 99, 98, 97, 96, 95,",
    "a, b, c, d, e, f, g,",
    "A B C D E F G H I J K",
    "Monday, Tuesday, Wednesday,",
    "January, February, March, April,",
    "one, two, three, four, five,",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6\n4 + 4 = 8\n",
    "3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n",
    "<li>1</li>\n<li>2</li>\n<li>3</li>\n",
    "x = [0, 1, 2, 3, 4, 5,",
    "1. one\n2. two\n3. three\n4. four\n",
    "for i in range(10):\n    print(i)\n\nfor i in range(20):\n    print(i)\n\nfor i in range(30):\n",
    "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat.",
    "row, row, row, row, row, row,",
    "ha ha ha ha ha ha ha",
    "0000000000000000",
    "yes no yes no yes no yes no",
    "tick tock tick tock tick tock",
    "INSERT INTO t VALUES (1);\nINSERT INTO t VALUES (2);\nINSERT INTO t VALUES (3);\n",
    "| 1 | 1 |\n| 2 | 4 |\n| 3 | 9 |\n| 4 | 16 |\n",
    "a=1\nb=2\nc=3\nd=4\n",
    '{"id": 1}\n{"id": 2}\n{"id": 3}\n',
    "import os\nimport sys\nimport json\nimport re\n",
    "Chapter 1\nChapter 2\nChapter 3\nChapter 4\n",
    "I am a robot. I am a robot. I am a robot.",
    "10 9 8 7 6 5 4 3 2",
    "public void setA(int a) { this.a = a; }\npublic void setB(int b) { this.b = b; }\n",
    "def one():\n    return 1\n\ndef two():\n    return 2\n\ndef three():\n    return 3\n\n",
    "The sun is hot. The ice is cold. The sun is hot. The ice is cold.",
    "do re mi fa sol la ti do re mi fa sol la ti do",
    "red green blue red green blue red green blue",
    "=====\n-----\n=====\n-----\n",
    "2020, 2021, 2022, 2023,",
    "0.1, 0.2, 0.3, 0.4,",
    "1/2, 1/3, 1/4, 1/5,",
    "abc abc abc abc abc",
    "Hello Hello Hello Hello",
    "() () () () ()",
]


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """A text after the token that begins documents; a chat by the model's template."""
    if isinstance(prompt, str):
        return [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(prompt)]
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def by_llama_cpp(
    path: Path, prompts: list[list[int]], stop_ids: set[int], **changes: Any
) -> tuple[list[list[int]], list[float]]:
    """Tokens of each prompt until a stop token, which is kept, and the smallest lead of a token over the second."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **{**SETTINGS, **changes})
    found, leads = [], []
    for ids in prompts:
        model.reset()
        model.eval(ids)
        tokens: list[int] = []
        lead = float("inf")
        while len(tokens) < TOKENS and not (tokens and tokens[-1] in stop_ids):
            first, second = torch.tensor(model.scores[model.n_tokens - 1]).topk(2).values.tolist()
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            lead = min(lead, first - second)
            model.eval(tokens[-1:])
        found.append(tokens)
        leads.append(round(lead, 4))
    return found, leads


def by_danlu(model: CausalLM, prompts: list[list[int]], stop_ids: set[int]) -> list[list[int]]:
    """The same, one prompt at a time."""
    found = []
    for ids in prompts:
        tokens: list[int] = []
        for token_id in generate_tokens(model, ids, SamplingParams(max_new_tokens=TOKENS, temperature=0.0)):
            tokens.append(token_id)
            if token_id in stop_ids:
                break
        found.append(tokens)
    return found


def steady(path: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first twenty candidates that llama.cpp continues alike from the 4-bit file whatever the order of its sums:
    prompts at once, token by token, and with flash attention. Elsewhere its own rounding decides."""
    ids, stop_ids = [prompt_ids(tokenizer, prompt) for prompt in STEADY], set(tokenizer.stop_ids)
    orders: list[dict[str, Any]] = [{}, {"n_batch": 1}, {"flash_attn": True}]
    runs = [by_llama_cpp(path, ids, stop_ids, **changes)[0] for changes in orders]
    found = [
        {"prompt": prompt, "ids": row, "q4_1": one}
        for prompt, row, one, *others in zip(STEADY, ids, *runs, strict=True)
        if all(other == one for other in others)
    ]
    print(f"llama.cpp agrees with itself on {len(found)} of {len(STEADY)} candidates; the first {TWENTY} are recorded")
    return found[:TWENTY]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """How many of the prompts are continued alike to the end."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def write_reference(path: Path, reference: dict[str, Any]) -> None:
    """JSON with one line a prompt, the two lists last."""
    lists = {name: reference[name] for name in ("prompts", "steady")}
    head = {name: value for name, value in reference.items() if name not in lists}
    parts = [json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")]
    for name, rows in lists.items():
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        parts.append(f' "{name}": [\n  {lines}\n ]')
    path.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Run both, print the table, write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf (danlu pull smollm2)")
    parser.add_argument("--json", type=Path, help="where to write the reference")
    arguments = parser.parse_args()
    tokenizer, model = Tokenizer.load(arguments.model), load_model(arguments.model)
    stop_ids = set(tokenizer.stop_ids)
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    stored, stored_leads = by_llama_cpp(arguments.model, prompts, stop_ids)
    one_by_one, _ = by_llama_cpp(arguments.model, prompts, stop_ids, n_batch=1)
    flash, _ = by_llama_cpp(arguments.model, prompts, stop_ids, flash_attn=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "f32.gguf"
        convert(ConvertConfig(source=arguments.model, out=plain, dtype="f32"))
        exact, exact_leads = by_llama_cpp(plain, prompts, stop_ids)
    ours = by_danlu(model, prompts, stop_ids)
    counts = {
        "danlu fp32, llama.cpp F32": agreement(ours, exact),
        "danlu fp32, llama.cpp Q4_1": agreement(ours, stored),
        "llama.cpp F32, llama.cpp Q4_1": agreement(exact, stored),
        "llama.cpp Q4_1, the same reading prompts token by token": agreement(stored, one_by_one),
        "llama.cpp Q4_1, the same with flash attention": agreement(stored, flash),
    }
    for what, count in counts.items():
        print(f"{what:<58} {count} of {len(prompts)}")
    reference: dict[str, Any] = {
        "command": "python benchmarks/gguf_reference.py SmolLM2-135M-Instruct.Q4_1.gguf --json "
        "tests/models/smollm2_greedy.json",
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "settings": SETTINGS,
        "tokens": TOKENS,
        "agreement": counts,
        "steady": steady(arguments.model, tokenizer),
        "prompts": [
            {"prompt": prompt, "ids": ids, "f32": a, "f32_lead": b, "q4_1": c, "q4_1_lead": d}
            for prompt, ids, a, b, c, d in zip(PROMPTS, prompts, exact, exact_leads, stored, stored_leads, strict=True)
        ],
    }
    if arguments.json:
        write_reference(arguments.json, reference)
    print(json.dumps({"benchmark": "gguf_reference", **counts}))


if __name__ == "__main__":
    main()
