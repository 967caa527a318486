"""A tokenizer as releases have them, and chat templates with their habits; all of it made here.

Beginning and end are named in tokenizer_config.json, padding is the end, role and tool tokens are not marked special,
and there are no tokens for fill-in-the-middle.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TURN = "<|turn_end|>"
ORDINARY = [
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<think>", "</think>",
]  # fmt: skip
TEXT = [
    'What is the weather in Paris? It is sunny, 21 degrees.\n\nI think so; you write Python. {"city": "Paris"}'
] * 30

# The habits of V3's: system text first, calls asked for by an answer whose content is none, arguments joined as text.
TOOLS_IN_TOKENS = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(tool=false, first=true, system='') -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{% endif -%}
{%- endfor -%}
{{- bos_token }}{{ ns.system }}
{%- if tools %}{{ '\\n## Tools\\n' }}{% for t in tools %}{{ t | tojson }}{{ '\\n' }}{% endfor %}{% endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m['content'] }}{% endif -%}
{%- if m['role'] == 'assistant' and m['content'] is none -%}
{%- set ns.first = true -%}
{%- for call in m['tool_calls'] -%}
{%- if ns.first %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{% else %}{{ '\\n' }}{% endif -%}
{%- set ns.first = false -%}
{%- set f = call['function'] -%}
{{- '<｜tool▁call▁begin｜>' + f['name'] + '<｜tool▁sep｜>' + f['arguments'] + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' + eos_token }}
{%- endif -%}
{%- if m['role'] == 'assistant' and m['content'] is not none -%}
{%- if ns.tool %}{{ '<｜tool▁outputs▁end｜>' + m['content'] + eos_token }}{% set ns.tool = false %}
{%- else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif -%}
{%- endif -%}
{%- if m['role'] == 'tool' -%}
{%- if not ns.tool %}{{ '<｜tool▁outputs▁begin｜>' }}{% endif -%}
{%- set ns.tool = true %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if ns.tool and add_generation_prompt %}{{ '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif -%}
"""
# The habits of ChatML: a line break after each turn's end, objects as arguments, reasoning in the last turn only.
LAST_REASONING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}{{ '[tools]' + (tools | tojson) + '<|turn_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{{- '[' + m.role + (' ' + m.name if m.name else '') + ']\\n' -}}
{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last -%}
{{- '<think>' + m.reasoning_content + '</think>' -}}
{%- endif -%}
{{- m.content or '' -}}
{%- for call in m.tool_calls or [] %}{{ '\\n' + call.function.name + (call.function.arguments | tojson) }}{% endfor -%}
{{- '<|turn_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif -%}
"""
# Answers marked; a variable of its own.
MARKED = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<｜Assistant｜>' -}}{%- generation -%}
{%- if thinking and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}
{{- m.content + eos_token -}}{%- endgeneration -%}
{%- else %}{{ '<｜User｜>' + m.role + ': ' + m.content }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif -%}
"""
# What R1's does: whatever an answer has before </think> is gone.
FORGETFUL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif -%}
{%- if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif -%}
"""


def released(folder: Path, template: str | None, **config: object) -> Path:
    """Write the tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*ORDINARY, TURN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    as_released = {
        "__type": "AddedToken",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {**as_released, "content": BOS},
        "eos_token": {**as_released, "content": EOS},
        "pad_token": {**as_released, "content": EOS},
        "unk_token": None,
        "add_bos_token": True,
        "model_max_length": 131072,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder
