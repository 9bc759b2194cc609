"""Tasks of lm-eval as files with data beside them; nothing is downloaded."""

import json
from pathlib import Path

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {folder}/cache
test_split: train
{more}"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{question}}{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
WRITTEN = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
KINDS = dict(choice=CHOICE, rolling=ROLLING, written=WRITTEN)


def made(folder: Path) -> list[str]:
    """Three task files: multiple choice, the perplexity of texts, and continuations."""
    data = folder / "questions.jsonl"
    choices = ["fox", " a cat", "the lazy dog", "nothing"]
    lines = [dict(question=f"number {n} jumps over", choices=choices, answer=n % 4) for n in range(10)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, more in KINDS.items():
        text = TASK.format(name=f"local_{name}", data=data, folder=folder, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in KINDS]
