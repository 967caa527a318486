"""The reader against bash itself: the words that a script starts its trainer with."""

import subprocess
from pathlib import Path

import pytest

from dsv3_megatron.adopt.shell import read

SCRIPTS = Path(__file__).parent / "scripts"


def by_bash(script: Path, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The words that `torchrun` gets when bash runs the script."""
    stub = folder / "bin" / "torchrun"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f"#!/bin/bash\nprintf '%s\\n' torchrun \"$@\" > {folder}/words\n")
    stub.chmod(0o755)
    (folder / "logs").mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", str(script.resolve()), *arguments],
        cwd=folder,
        env={"PATH": f"{stub.parent}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (folder / "words").is_file(), done.stderr
    return (folder / "words").read_text().splitlines()


def by_reader(script: Path, *arguments: str, **given: str) -> list[str]:
    commands = [c for c in read(script, arguments, given).commands if c.words[0] == "torchrun"]
    assert len(commands) == 1
    return list(commands[0].words)


@pytest.mark.parametrize(
    ("name", "arguments", "environment"),
    [
        ("mindspeed_like.sh", [], {}),
        ("pai_like.sh", ["dsw", "A3B", "1e-5", "1", "4", "2", "/ck"], {}),
        ("pai_like.sh", ["dlc", "A3B", "1e-5", "2", "2", "2"], {"WORLD_SIZE": "4"}),
        ("rocm_like.sh", [], {"DATA_PREFIX": "/data/x"}),
        ("rocm_like.sh", [], {"DATA_PREFIX": "/data/x", "FP8": "1", "RECOMPUTE": "full", "TP": "4"}),
    ],
)
def test_whole_scripts(name: str, arguments: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    expected = by_bash(SCRIPTS / name, tmp_path, *arguments, **environment)
    assert by_reader(SCRIPTS / name, *arguments, **environment) == expected


CONSTRUCTS = {
    "quotes": """A="x y" B='$A' C=a\\ b; torchrun "$A" "$B" $C "$C" "it's" 'say "hi"' a"$A"b""",
    "splitting": """A="  one   two "; torchrun $A "$A" x$A""",
    "continuation": "torchrun --a 1 \\\n  --b 2 \\\n  --c\\\n3",
    "comments": "torchrun --a 1 # not this\n# nor that\n",
    "defaults": """X=; torchrun ${U:-d} ${U-d} ${X:-e} ${X-f}end ${X:+g}h ${V:=w} $V ${U:+no}""",
    "arrays": """A=(1 "2 3" x$((4+5))); A+=(6); torchrun "${A[@]}" ${#A[@]} ${A[1]} "${A[*]}" """,
    "associative": """declare -A M=([a]=1 [b]="2 3"); M[c]=4; torchrun "${M[b]}" ${M[a]} ${M[c]}""",
    "arithmetic": """P=3; Q=$((P*2+1)); ((R=Q%4)); torchrun $Q $R $((Q > 5 ? 10 : 20)) $((1<<4))""",
    "strings": """S=abc_def.sh; torchrun ${S%.sh} ${S#abc} ${S##*_} ${S/b/X} ${S:1:3} ${#S} ${S^^} ${S//[bd]/-}""",
    "if": """X=2; if [ $X -gt 1 ] && [[ $X != 3 ]]; then A=1; elif [ -z "$X" ]; then A=2; else A=3; fi; torchrun $A""",
    "nested if": """X=b; if [[ "$X" == a || "$X" == b ]]; then if [ -n "" ]; then A=1; else A=2; fi; fi; torchrun $A""",
    "case": """X=fp8; case $X in bf16) A=1;; fp8|fp16) A=2;; *) A=3;; esac; torchrun $A""",
    "for": """for i in 1 2 3; do A="$A --x$i"; done; torchrun $A""",
    "function": """f() { local B=$2; A="$1 $B"; }; f one two; torchrun $A $#""",
    "arguments that are none": """A=(); torchrun --a "$@" "${A[@]}" x"$@" "" "${A[*]}" """,
    "append": """A="--a"; A+=" --b"; torchrun $A""",
    "eval": """A='--x "1 2"'; eval torchrun $A""",
    "string of a command": """C="torchrun --a 1"; C="$C --b '2 3'"; eval $C""",
    "here-document": """cat <<EOF > /dev/null\ntorchrun not this\nEOF\ntorchrun this""",
    "redirections": "torchrun --a 1 2>&1 | tee log.txt",
    "environment before": "A=1 B=2 torchrun --x",
    "shift": "set -- a b c; shift; torchrun $1 $#  $*",
    "pattern test": """X="--foo bar"; if [[ ! "$X" =~ "--baz" ]]; then X="$X --baz"; fi; torchrun $X""",
    "braces": "torchrun ${HOME_NOT_SET:-{x}} a{1}",
    "command substitution": "A=$(echo one two); torchrun $A `echo three`",
    "export": "export A=1 B='x y'; torchrun $A \"$B\"",
    "while": 'i=0; while [ $i -lt 3 ]; do i=$((i+1)); A="$A $i"; done; torchrun $A',
}


@pytest.mark.parametrize("text", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
def test_constructs(text: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(text + "\n")
    assert by_reader(script) == by_bash(script, tmp_path)


def test_files_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "sizes.conf").write_text("export LAYERS=${LAYERS:-5}\n")
    (tmp_path / "inner.sh").write_text('torchrun --num-layers $LAYERS "$@"\n')
    script = tmp_path / "script.sh"
    script.write_text(
        'HERE=$(cd "$(dirname "$0")" && pwd)\nsource $HERE/sizes.conf\nLR=3 bash $HERE/inner.sh --lr 1\n'
    )
    assert by_reader(script) == by_bash(script, tmp_path) == ["torchrun", "--num-layers", "5", "--lr", "1"]


def test_what_is_not_known_stays(tmp_path: Path) -> None:
    """Neither made up nor lost: a variable of the environment, the output of a command, a condition on them."""
    script = tmp_path / "script.sh"
    script.write_text(
        "N=$(nvidia-smi -L | wc -l)\n"
        "if [ $N -gt 4 ]; then A=--big; else A=--small; fi\n"
        'torchrun --n $N --data "$DATA" --here ${PLACE}/x $A\n'
    )
    found = read(script)
    words = found.commands[-1].words
    assert words[0] == "torchrun" and "${DATA}" in words and "${PLACE}/x" in words
    assert any("${" in word for word in words[2:3]) and len(found.notes) == 1 and "line 2" in found.notes[0]


def test_nothing_is_run(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(f"touch {tmp_path}/ran; $(touch {tmp_path}/ran); `touch {tmp_path}/ran`\ntorchrun x\n")
    assert by_reader(script) == ["torchrun", "x"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ['torchrun "not closed', "if true; then torchrun x", "f() { torchrun x", "$((1"]
)
def test_broken_scripts(text: str, tmp_path: Path) -> None:
    """An error of this module's or a result, not another exception."""
    script = tmp_path / "script.sh"
    script.write_text(text)
    try:
        read(script)
    except ValueError as error:
        assert str(error)


def test_scripts_that_are_started(tmp_path: Path) -> None:
    """By their names, from the folder above too, with what the environment gives them; what is not there is said."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "inner.sh").write_text("torchrun --n $N\nexec ./jobs/inner.sh\n")
    script = tmp_path / "jobs" / "outer.sh"
    for start in (
        "bash jobs/inner.sh",
        "./inner.sh",
        "exec srun --x=1 bash jobs/inner.sh",
        "sbatch -N 2 inner.sh",
    ):
        script.write_text(f"#!/bin/bash\n#SBATCH --nodes=4 # of them\n\nexport N=3\n{start}\n#SBATCH -N 9\n")
        found = read(script)
        assert {c.words for c in found.commands if c.words[0] == "torchrun"} == {("torchrun", "--n", "3")}
        assert found.slurm == ["--nodes=4"]
    script.write_text("cp inner.sh /tmp\nbash /elsewhere/run.sh\n")
    found = read(script)
    assert found.started == {"/elsewhere/run.sh": False}
    assert not [c for c in found.commands if c.words[0] == "torchrun"]


def test_the_environment_of_a_command(tmp_path: Path) -> None:
    """What is exported or set on its line, and of that what a step may depend on."""
    script = tmp_path / "script.sh"
    script.write_text("NVTE_A=1\nexport NVTE_B=2 X=3\nNVTE_C=4 torchrun x\nexport NVTE_A\ntorchrun y\n")
    first, second = (c.env for c in read(script).commands)
    assert first == {"NVTE_B": "2", "NVTE_C": "4"} and second == {"NVTE_A": "1", "NVTE_B": "2"}


def test_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("while true; do A=1; done\nf() { f; }\nf\nsource script.sh\ntorchrun x\n")
    read(script)
