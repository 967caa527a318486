"""What an export carries beside the weights: the files of a list, nothing else, and ids at which a generation ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dsv3_megatron.convert.errors import ConversionError
from dsv3_megatron.convert.release_files import with_token_ids
from dsv3_megatron.convert.to_hf import megatron_to_hf
from dsv3_megatron.convert.to_megatron import hf_to_megatron
from dsv3_megatron.data.tokenizer_files import TokenizerError, chat_template, token_id
from tests.convert.releases import micro, named, release, rewrite, tensors_of

END, STOP = 7, 8  # the tokenizer's end of a text, and another that a chat model ends its turn with
PLANTED = [
    "train.bin", "train.idx", "valid.bin", "corpus.jsonl", "corpus.txt", "chats.json", "prepared.json", "sft.json",
    "train_tokens.npy", "README.md", "notes.md", ".env", ".git-credentials", ".DS_Store", "optimizer.pt",
    "pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "trainer_state.json", "rng_state_0.pth",
    "events.out.tfevents.1", "run.log", "secrets.json", "helper.py", "modeling_other.py", "tokenizer.json.bak",
    "tokenizer_config.json~", "vocab.txt", "config.json.orig", "generation_config.yaml", "chat_template.txt",
]  # fmt: skip
FOLDERS = ["wandb", ".git", ".cache", "checkpoints", "original", "additional_chat_templates_old"]


def tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(96) if number not in (END, STOP)}
    made = Tokenizer(models.WordLevel(words | {"<end>": END, "<stop>": STOP}, "w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="w1",
        eos_token="<end>",
        pad_token="w2",
        unk_token="w0",
        chat_template="{{ 1 }}",
    ).save_pretrained(folder)


def plant(folder: Path) -> None:
    for name in PLANTED:
        (folder / name).write_text('{"secret": 1}')
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    release(tmp_path / "hf")
    tokenizer(tmp_path / "hf")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", [True, 1.5, "", "7", {}, {"a": 1}, ["x"], [[7]]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_are_none_are_named(file: str, wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    config: dict[str, Any] = {}
    if file == "config.json":
        config = {"eos_token_id": wrong}
    else:
        (tmp_path / file).write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ConversionError, match=rf"^{file}: eos_token_id=.*a token id or a list of them"):
        with_token_ids(config, tmp_path, 96)


@pytest.mark.parametrize(
    "file, key, message",
    [
        ("tokenizer.json", "added_tokens", "tokenizer.json: added_tokens is not a list of tokens"),
        ("tokenizer_config.json", "chat_template", "chat_template is neither a text nor a list"),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            "added_tokens_decoder is not an object of tokens by id",
        ),
    ],
)
def test_tokenizers_that_are_none_are_named(file: str, key: str, message: str, tmp_path: Path) -> None:
    tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | {key: [5]}))
    with pytest.raises(TokenizerError, match=message):
        token_id(tmp_path, "nowhere")
        chat_template(tmp_path)


WEIGHTS = {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
CONFIGS = {"config.json", "generation_config.json"}
OF_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_planted_files_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither from a release through the checkpoint, nor from the folder of a training's tokenizer."""
    plant(folder / "hf")
    (folder / "hf" / "additional_chat_templates").mkdir()
    (folder / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 2 }}")
    (folder / "hf" / "additional_chat_templates" / "train.bin").write_text("x")
    hf_to_megatron(folder / "hf", folder / "megatron")
    carried = OF_TOKENIZER | {"additional_chat_templates/tool_use.jinja"}
    assert files(folder / "megatron" / "hf") == carried | CONFIGS
    said = capsys.readouterr().err
    assert "left there:" in said and ".env" in said and "more" in said
    megatron_to_hf(folder / "megatron", folder / "back")
    assert files(folder / "back") == WEIGHTS | CONFIGS | carried
    megatron_to_hf(folder / "megatron", folder / "direct", hf_files=folder / "hf")
    assert files(folder / "direct") == WEIGHTS | CONFIGS | carried
    for name in OF_TOKENIZER:
        assert (folder / "direct" / name).read_bytes() == (folder / "hf" / name).read_bytes()


def test_paths_of_this_machine_stay(folder: Path) -> None:
    path = str(folder / "hf")
    named(folder / "hf", _name_or_path=path)
    config = folder / "hf" / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"name_or_path": path, "tokenizer_file": path})
    )
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    for name in files(folder / "back"):
        assert path.encode() not in (folder / "back" / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(folder / "back").eos_token == "<end>"


def test_code_goes_along_where_auto_map_names_it(folder: Path) -> None:
    hf = folder / "hf"
    named(
        hf,
        auto_map={"AutoConfig": "configuration_kimi.Config", "AutoModel": "other/repo--modeling_far.Model"},
    )
    config = hf / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    (hf / "configuration_kimi.py").write_text("class Config: ...\n")
    (hf / "tokenization_kimi.py").write_text("import os\nfrom .declarations import encode\n")
    for name in ("declarations", "modeling_far", "unrelated"):
        (hf / f"{name}.py").write_text("")
    (hf / "tiktoken.model").write_bytes(b"YQ== 0\n")
    hf_to_megatron(hf, folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    code = {"configuration_kimi.py", "tokenization_kimi.py", "declarations.py", "tiktoken.model"}
    assert files(folder / "back") == WEIGHTS | CONFIGS | OF_TOKENIZER | code


def forced(folder: Path, token: int) -> None:
    """After any token the model says this one: its last hidden state is a constant that one row sees."""
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()  # layers add nothing
    tensors["model.embed_tokens.weight"][:] = 0.0
    tensors["model.embed_tokens.weight"][:, 0] = 1.0
    tensors["lm_head.weight"].zero_()
    tensors["lm_head.weight"][token, 0] = 1.0
    rewrite(folder, tensors)


def generated(folder: Path) -> list[int]:
    """What transformers adds to three tokens, with nothing but the folder's files saying where to stop."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.generate(torch.tensor([[20, 21, 22]]), max_new_tokens=9, do_sample=False)[0, 3:].tolist()


@pytest.mark.parametrize("token, stops", [(END, True), (STOP, True), (30, False)])
def test_generation_ends_where_it_should(folder: Path, token: int, stops: bool) -> None:
    """At the tokenizer's end and at what generation_config.json adds; config.json of the release says neither."""
    forced(folder / "hf", token)
    named(folder / "hf", eos_token_id=None, bos_token_id=None)
    (folder / "hf" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": STOP, "temperature": 0.6})
    )
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    assert generated(folder / "back") == ([token] if stops else [token] * 9)
    config, generation = (json.loads((folder / "back" / name).read_text()) for name in sorted(CONFIGS))
    assert config["eos_token_id"] == generation["eos_token_id"] == [STOP, END]
    assert (config["bos_token_id"], config["pad_token_id"]) == (1, 2) and generation["temperature"] == 0.6


@pytest.mark.parametrize("source", ["tokenizer", "config.json", "nothing"])
def test_without_a_generation_config(folder: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer says it, else config.json; else nothing does, which is said and not guessed."""
    hf = folder / "hf"
    forced(hf, END)
    (hf / "generation_config.json").unlink()
    named(hf, eos_token_id=END if source == "config.json" else None, bos_token_id=None)
    if source != "tokenizer":
        for name in OF_TOKENIZER:
            (hf / name).unlink()
    hf_to_megatron(hf, folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "back")
    assert generated(folder / "back") == ([END] * 9 if source == "nothing" else [END])
    assert ("no end-of-sequence token is known" in capsys.readouterr().err) == (source == "nothing")


def test_config_made_of_the_training_alone_has_the_tokenizers_ids(folder: Path, monkeypatch: Any) -> None:
    """Its folder may hold a corpus, and another model's config.json."""
    import shutil

    from dsv3_megatron.convert.dist_checkpoint import DistCheckpoint

    forced(folder / "hf", END)
    hf_to_megatron(folder / "hf", folder / "megatron")
    shutil.rmtree(folder / "megatron" / "hf")
    corpus = folder / "corpus"
    tokenizer(corpus)
    plant(corpus)
    (corpus / "config.json").write_text('{"model_type": "gpt2"}')
    arguments = DistCheckpoint(folder / "megatron").arguments()
    arguments.tokenizer_model = str(corpus)
    monkeypatch.setattr(DistCheckpoint, "arguments", lambda self: arguments)
    megatron_to_hf(folder / "megatron", folder / "back")
    assert files(folder / "back") == WEIGHTS | CONFIGS | OF_TOKENIZER
    assert generated(folder / "back") == [END]
    with pytest.raises(ConversionError, match=r"--hf-files .*corpus: config.json: model_type='gpt2'"):
        megatron_to_hf(folder / "megatron", folder / "other", hf_files=corpus)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    named(folder / "hf", eos_token_id=96)
    hf_to_megatron(folder / "hf", folder / "megatron")
    with pytest.raises(ConversionError, match="eos_token_id is 96, and the model has 96 tokens"):
        megatron_to_hf(folder / "megatron", folder / "back")


def test_micro_is_still_loaded_with_its_own_ids(tmp_path: Path) -> None:
    """An unknown end is null in config.json: an absent key would be token 1 for transformers."""
    release(tmp_path / "hf", micro(eos_token_id=None, bos_token_id=None))
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.eos_token_id is None
