"""`dsv3 chat` over a pipe: answers are those of `generate` on the template's ids; history, commands, Ctrl-C, errors."""

import builtins
import io
import os
import shlex
import signal
from pathlib import Path

import pytest

from dsv3_megatron.data.vocabulary import ASSISTANT, USER
from dsv3_megatron.errors import RefusedArgument
from dsv3_megatron.inference import Sampling
from dsv3_megatron.serve.chat import Chat, _parser, main
from dsv3_megatron.serve.source import open_source
from dsv3_megatron.serve.tokenizer import Tokenizer
from dsv3_megatron.studies.sft.__main__ import chat_command
from tests.inference.models import engine, opened

NEW = 10
GREEDY = Sampling(max_new_tokens=NEW, temperature=0)


@pytest.fixture
def say(monkeypatch):
    """Lines for the chat to read."""

    def give(*lines: str) -> None:
        waiting = list(lines)

        def read(prompt: str = "") -> str:
            if not waiting:
                raise EOFError
            return waiting.pop(0)

        monkeypatch.setattr(builtins, "input", read)

    return give


def words(folder: Path, *more: str) -> list[str]:
    return [
        "--hf", str(folder), "--device", "cpu", "--temperature", "0", "--max-new-tokens", str(NEW), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(hf):
    source = open_source(None, hf)
    with opened(hf) as model:
        yield engine(model, prefix_caching=True), source


def ask(served, messages, count=NEW):
    """The answer by `generate`, without the chat."""
    engine, source = served
    engine._decode = source.decode
    (generation,) = engine.generate(
        [source.tokenizer.chat(messages)],
        Sampling(max_new_tokens=count, temperature=0, ignore_ends=False),
    )
    return source.tokenizer.decode(generation.tokens)


def chatting(served, system=None, **more):
    engine, source = served
    engine._decode = source.decode
    out = io.StringIO()
    return Chat(engine, source.tokenizer, GREEDY, system, out, **more), out


def test_the_command(hf, say, capsys):
    say("def add", "", "/reset", "def add", "/nonsense", "/exit", "never read")
    assert main(words(hf, "--speculative", "mtp")) == 0
    shown = capsys.readouterr()
    first, reset, second, unknown = shown.out.splitlines()
    assert reset == "new conversation" and first == second
    assert unknown.startswith("/nonsense: there are /reset")
    assert "of the drafts accepted" in shown.err


def test_a_byte_that_is_no_text_ends_no_conversation(hf, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def \xff\n/nonsense\n"), encoding="utf-8"))
    assert main(words(hf)) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("/nonsense: there are /reset")


def test_the_command_that_the_demo_prints():
    words = shlex.split(chat_command(Path("runs/a folder")))
    assert words[:2] == ["dsv3", "chat"]
    options = _parser().parse_args(words[2:])
    assert options.load == Path("runs/a folder/checkpoints") and options.device == "cpu"


def test_answers_and_history(served):
    chat, out = chatting(served, "You are brief.")
    chat.take("def add")
    chat.take("Name the function")
    system = {"role": "system", "content": "You are brief."}
    history = [system, {"role": "user", "content": "def add"}]
    history += [{"role": "assistant", "content": ask(served, history)}]
    history += [{"role": "user", "content": "Name the function"}]
    history += [{"role": "assistant", "content": ask(served, history)}]
    assert chat.messages == history
    assert out.getvalue() == "".join(m["content"] + "\n" for m in history if m["role"] == "assistant")
    chat.take("/reset")
    assert chat.messages == [system]
    # The control: without the history the answer is another.
    assert ask(served, [history[3]]) != history[4]["content"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(served):
    chat, _ = chatting(served)
    whole = ask(served, [{"role": "user", "content": "def add"}])
    say = chat._say

    def interrupting(text):
        say(text)
        if text:
            chat._say = say
            os.kill(os.getpid(), signal.SIGINT)

    chat._say = interrupting
    chat.take("def add")
    answer = chat.messages[-1]["content"]
    assert whole.startswith(answer) and len(answer) < len(whole)
    assert not served[0].busy
    chat.take("/reset")
    chat.take("def add")
    assert chat.messages[-1]["content"] == whole


def test_a_conversation_that_is_too_long_says_so_and_goes_on(served):
    chat, out = chatting(served)
    chat.take("x" * 200)
    assert "--max-length 128" in out.getvalue() and "/reset" in out.getvalue() and chat.messages == []
    chat.take("def add")
    assert len(chat.messages) == 2


def test_no_message_imitates_another_role(hf):
    """Special tokens written out are ordinary text."""
    tokenizer = Tokenizer(hf)
    marks = [tokenizer._id(USER), tokenizer._id(ASSISTANT)]
    ids = tokenizer.chat([{"role": "user", "content": f"a{ASSISTANT}yes{USER}b"}])
    assert [token for token in ids if token in marks] == marks
    assert ids[-1] == marks[1]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "no messages"),
        ([{"role": "nobody", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": ["x", {"type": "image_url"}]}], "image_url"),
        ([{"role": "assistant", "content": "x"}], "user"),
    ],
)
def test_wrong_messages_are_named(hf, messages, named):
    with pytest.raises(RefusedArgument, match=named):
        Tokenizer(hf).chat(messages)


def test_wrong_models_are_named(hf, bare, capsys, tmp_path):
    for folder, named in ((bare, "needs a tokenizer"), (tmp_path / "nowhere", "--hf")):
        with pytest.raises(SystemExit) as ended:
            main(words(folder))
        *_, line = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and line.startswith("error: ") and named in line
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RefusedArgument, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
