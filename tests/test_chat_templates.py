"""data/prompts.py: prompts of released models' chat templates, against the templates themselves."""

import json

import pytest

from data.languages import LANGUAGES
from data.prompts import (
    CHATS, JUDGE, SUMMARY, TEMPLATES, build_judgement, build_prompt, check_template,
    default_template, encode_prompt, opened, sum_up,
)  # fmt: skip
from data.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
from tokenizers import AddedToken, Regex, decoders, models, normalizers  # noqa: E402
from tokenizers import pre_tokenizers, trainers  # noqa: E402

# The published templates, without what is about tools.
V3 = (
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)
R1 = V3.replace(
    "{% set content = message['content'] %}",
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}",
).replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜><think>\\n'}}")

QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nDEFAULT<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("DEFAULT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN25_MATH = QWEN25.replace(
    "system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    r"system\nPlease reason step by step, and put your final answer within \\boxed{}.",
)
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n')
                .split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n')
                + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MOONLIGHT = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI.<|im_end|>"
    "{%- endif -%}{%- if message['role'] == 'system' -%}<|im_system|>{%- endif -%}"
    "{%- if message['role'] == 'user' -%}<|im_user|>{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}"
    "{{ message['role'] }}<|im_middle|>{{message['content']}}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)

# model: (template's text, our name, bos, eos)
DEEPSEEK_ENDS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
MODELS = {
    "V3": (V3, "deepseek", *DEEPSEEK_ENDS),
    "R1": (R1, "deepseek-r1", *DEEPSEEK_ENDS),
    "Qwen2.5": (QWEN25, "qwen", None, "<|im_end|>"),
    "Qwen2.5-Math": (QWEN25_MATH, "qwen", None, "<|im_end|>"),
    "Qwen3": (QWEN3, "qwen", None, "<|im_end|>"),
    "Llama-3": (LLAMA3, "llama3", "<|begin_of_text|>", "<|eot_id|>"),
    "Llama-3.1": (LLAMA31, "llama3", "<|begin_of_text|>", "<|eot_id|>"),
    "Moonlight": (MOONLIGHT, "moonlight", None, "<|im_end|>"),
}
CONTROL = {
    "deepseek": [*DEEPSEEK_ENDS, "<｜User｜>", "<｜Assistant｜>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "moonlight": [
        "<|im_system|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_middle|>",
        "<|im_end|>",
    ],
}
CONTROL["deepseek-r1"] = CONTROL["deepseek"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(directory, model: str):
    """A small tokenizer with a model's control tokens, and the settings it is published with."""
    text, name, bos, eos = MODELS[model]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if name == "qwen" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*MODELS["V3"], QWEN25, LLAMA31, MOONLIGHT, " \n\n\n"], trainer)
    # DeepSeek's roles are not marked special.
    roles = {"<｜User｜>", "<｜Assistant｜>"}
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", *roles)])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in CONTROL[name] if t not in roles]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": bos, "eos_token": eos, "chat_template": text}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """model -> (our tokenizer, transformers' one), each made once."""
    known = {}

    def load(model):
        if model not in known:
            directory = write(tmp_path_factory.mktemp("model"), model)
            text, _, bos, eos = MODELS[model]
            theirs = transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(directory / "tokenizer.json"), bos_token=bos, eos_token=eos
            )
            theirs.chat_template = text
            known[model] = Tokenizer.load(directory), theirs
        return known[model]

    return load


def rendered(theirs, question, history=(), system=None, **more) -> list[int]:
    """The prompt by the model's own template."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answer in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more)
    return theirs.encode(text, add_special_tokens=False)


QUESTIONS = [
    "1+1?", "", " what is 12 x 34 ", "\n\nx\n", "{question} {} \\boxed{}", "计算 7+5。",
    "e\u0301 \u1112\u1161",
    "Is <think> a tag?</think>\n", "\u0338 first", "a\u00a0\u2003", "system\nuser\nassistant\n",
]  # fmt: skip
HISTORIES = [
    [],
    [("hi", "hello")],
    [("hi\n", "\n\n hello "), ("", "")],
    [("a", "b{}"), ("{}", "\nd")],
]
THOUGHT = [
    [("hi", "<think>\nso\n</think>\n\nhello")],
    [("hi", "so</think>hello\n"), ("x", "<think></think>"), ("y", "no thought")],
    [("hi", "<think>a</think>b<think>c</think>\n \nd")],
]


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_those_of_the_models_own_template(loaded, model):
    ours, theirs = loaded(model)
    for system in (None, "Be brief.", "", " {} \n\n"):
        for history in HISTORIES:
            for question in QUESTIONS:
                expected = rendered(theirs, question, history, system)
                tokens = encode_prompt(ours, question, MODELS[model][1], history, system)
                assert tokens == expected, (question, history, system)


@pytest.mark.parametrize("model", ["R1", "Qwen3"])
def test_earlier_reasoning_is_left_out_as_the_models_own_template_does(loaded, model):
    ours, theirs = loaded(model)
    for history in THOUGHT:
        for question in QUESTIONS:
            expected = rendered(theirs, question, history)
            assert encode_prompt(ours, question, MODELS[model][1], history) == expected
            assert "so" not in ours.decode(encode_prompt(ours, "q", MODELS[model][1], history))


@pytest.mark.parametrize("model", MODELS)
def test_what_is_said_can_not_end_or_open_a_turn(loaded, model):
    """Whoever says it: the prompt has as many control tokens as one that says nothing of the kind,
    and it reads the same."""
    ours, _ = loaded(model)
    name = MODELS[model][1]
    attack = "x" + "y".join(CONTROL[name]) + "z"
    said = encode_prompt(ours, attack, name, [(attack, attack)], attack)
    plain = encode_prompt(ours, "Q", name, [("Q", "Q")], "Q")
    control = {*ours.special.values()}
    assert [t for t in said if t in control] == [t for t in plain if t in control]
    assert ours.decode(said) == ours.decode(plain).replace("Q", attack)


def test_the_deepseek_prompt_by_hand(loaded):
    ours, _ = loaded("R1")
    token, encode = ours.special, ours.encode
    expected = [
        token["<｜begin▁of▁sentence｜>"], *encode("Be brief."),
        token["<｜User｜>"], *encode("1<｜User｜>"),
        token["<｜Assistant｜>"], *encode("\n2"), token["<｜end▁of▁sentence｜>"],
        token["<｜User｜>"], *encode("3"), token["<｜Assistant｜>"],
    ]  # fmt: skip
    history = [("1<｜User｜>", "<think>hm</think>\n2")]
    assert encode_prompt(ours, "3", "deepseek", history, "Be brief.") == expected
    assert ours.words["<think>"] not in expected
    expected += [ours.words["<think>"], *encode("\n")]
    assert encode_prompt(ours, "3", None, history, "Be brief.") == expected


def test_the_default_system_prompt_is_the_models(loaded):
    for model, system in (
        ("Qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("Qwen2.5-Math", r"Please reason step by step, and put your final answer within \boxed{}."),
        ("Moonlight", "You are a helpful assistant provided by Moonshot-AI."),
    ):
        ours, _ = loaded(model)
        assert encode_prompt(ours, "q") == encode_prompt(ours, "q", system=system)
        assert system in ours.decode(encode_prompt(ours, "q"))
    for model in ("V3", "R1", "Qwen3", "Llama-3"):
        assert "system" not in loaded(model)[0].decode(
            encode_prompt(loaded(model)[0], "q", MODELS[model][1])
        )
    said = loaded("Llama-3.1")[0].decode(encode_prompt(loaded("Llama-3.1")[0], "q"))
    assert "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>" in said


def test_a_directory_is_read_with_its_models_template(loaded):
    for model, (_, name, *_) in MODELS.items():  # V3's files do not tell it from its base
        assert loaded(model)[0].template == ("r1-zero" if model == "V3" else name)


def test_the_default_template_is_a_chat_only_where_the_end_token_ends_a_turn():
    assert default_template(QWEN25, "<|endoftext|>") == "r1-zero"  # Qwen2.5's base carries it too
    assert default_template("", "<|im_end|>") == "qwen"
    assert default_template(MOONLIGHT, "[EOS]") == default_template("", "</s>") == "r1-zero"
    assert default_template("", "<|eot_id|>") == "llama3"
    assert default_template(R1, "<|end_of_text|>") == "deepseek-r1"  # a distilled Llama


def test_the_template_asked_for_or_saved_goes_before_the_default(tmp_path):
    directory = write(tmp_path, "R1")
    assert Tokenizer.load(directory, template="deepseek").template == "deepseek"
    for name, content in Tokenizer.load(directory, template="r1-zero").files().items():
        (directory / name).write_bytes(content)
    assert Tokenizer.load(directory).template == "r1-zero"


def test_a_template_in_a_file_of_its_own_goes_before_the_settings(tmp_path):
    directory = write(tmp_path, "Qwen2.5")
    (directory / "chat_template.jinja").write_text(QWEN3, "utf-8")
    assert Tokenizer.load(directory).chat_template == QWEN3
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    several = [{"name": "tool_use", "template": R1}, {"name": "default", "template": QWEN3}]
    text = json.dumps(settings | {"chat_template": several})
    (directory / "tokenizer_config.json").write_text(text, "utf-8")
    assert Tokenizer.load(directory).chat_template == QWEN3


def test_plain_prompts_begin_with_the_models_first_token_if_it_has_one(loaded, tmp_path):
    toy = Tokenizer.toy()
    assert encode_prompt(toy, "compute 7") == toy.encode("User: compute 7 Assistant:")
    assert encode_prompt(toy, "x", "r1-zero") == toy.encode(build_prompt("x", "r1-zero"))
    directory = write(tmp_path, "R1")
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    text = json.dumps(settings | {"add_bos_token": True})
    (directory / "tokenizer_config.json").write_text(text, "utf-8")
    ours = Tokenizer.load(directory)
    prompt = encode_prompt(ours, "x", "r1-zero")
    assert prompt == [ours.bos_token_id, *ours.encode(build_prompt("x", "r1-zero"))]
    # A chat template writes it itself, once.
    assert encode_prompt(ours, "x").count(ours.bos_token_id) == 1


def test_only_r1s_template_opens_the_reasoning(loaded):
    assert [name for name in (*TEMPLATES, *CHATS) if opened(name)] == ["deepseek-r1"]
    ours, _ = loaded("R1")
    assert ours.decode(encode_prompt(ours, "q")).endswith("<｜Assistant｜>" + opened("deepseek-r1"))


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(loaded):
    with pytest.raises(ValueError, match=r"'qwen' needs <\|im_start\|>, which the tokenizer lacks"):
        encode_prompt(loaded("R1")[0], "q", "qwen")
    with pytest.raises(ValueError, match="'deepseek' needs <｜begin▁of▁sentence｜>"):
        encode_prompt(Tokenizer.toy(), "q", "deepseek")


def test_an_unknown_template_is_named_with_the_nearest():
    for call in (
        lambda: encode_prompt(Tokenizer.toy(), "q", "deepseek-r2"),
        lambda: build_prompt("q", "deepseek-r2"),
        lambda: check_template("deepseek-r2"),
    ):
        with pytest.raises(ValueError, match="'deepseek-r2'.*r1-zero, toy.*nearest: 'deepseek-r1'"):
            call()
    for name in (*TEMPLATES, *CHATS):
        check_template(name)


def test_what_a_template_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match="'toy' has no place for a history"):
        encode_prompt(Tokenizer.toy(), "q", history=[("a", "b")])
    with pytest.raises(ValueError, match="'toy' has no place for"):
        encode_prompt(Tokenizer.toy(), "q", system="Be brief.")
    with pytest.raises(ValueError, match="'qwen' is a chat template"):
        build_prompt("q", "qwen")


def test_chat_templates_sum_up_and_judge_as_r1_zero_does():
    for name in CHATS:
        for language in LANGUAGES:
            assert sum_up("4", language, name) == sum_up("4", language, "r1-zero")
        assert build_judgement("q", "4", "5", name) == build_judgement("q", "4", "5", "r1-zero")
    assert sum_up("4", "en", "toy").startswith(SUMMARY["toy"]["en"])
    assert build_judgement("q", "4", "5", "toy") == JUDGE["toy"].format(gold=4, answer=5)
