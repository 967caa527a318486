"""What stands before a trainer: sizes by torchrun and Slurm, variables, and what is the shell's behind it."""

import shlex
from pathlib import Path

import pytest

from dsv3_megatron.adopt.__main__ import launches_of
from dsv3_megatron.adopt.launcher import environment, size, without_shell
from dsv3_megatron.adopt.translate import launch_of
from dsv3_megatron.errors import RefusedArgument


@pytest.mark.parametrize(
    ("line", "slurm", "expected"),
    [
        ("torchrun --nnodes 2 --nproc_per_node=8", "", (2, 8)),
        ("srun -N 2 --ntasks-per-node=8 python -u", "", (2, 8)),
        ("srun -N2 -n16 python", "", (2, 8)),
        ("srun --nodes=2 -n 16 --gpus-per-node 8 python", "", (2, 8)),
        ("srun -n 16 --gres=nvme:1,gpu:h100:4 python", "", (4, 4)),
        ("srun --nodes 2 --gres gpu:8 python", "", (2, 8)),
        ("srun -N 2 --gpus=16 python", "", (2, 8)),
        ("srun -N 2 -n 8 --ntasks-per-node=8 python", "", (2, 4)),  # the number on a node is the most
        ("srun -n 16 python", "", (2, 8)),
        ("srun -n 4 python", "", (1, 4)),
        ("srun -n 12 python", "", (None, None)),
        ("srun -N 2 numactl -N 0 python", "", (2, None)),  # numactl's own -N
        ("srun -N 2-4 python", "", (None, None)),
        # torchrun starts the ranks, whatever starts it.
        ("srun -N 2 --ntasks-per-node=1 torchrun --nnodes $NNODES --nproc-per-node 8", "", (2, 8)),
        ("srun -N 2 --gpus-per-node=4 torchrun --nnodes 2 --nproc-per-node gpu", "", (2, 4)),
        ("torchrun --nnodes ${SLURM_NNODES} --nproc-per-node 8", "--nodes=32 --ntasks-per-node=1", (32, 8)),
        ("torchrun --nproc-per-node 8", "--nodes=32", (None, 8)),
        ("srun python", "--nodes=32 --ntasks-per-node=8", (32, 8)),
        ("srun -N 4 python", "--nodes=32 --ntasks-per-node=8", (4, 8)),
        ("mpirun -N 8 python", "", (None, None)),
        ("python", "", (None, None)),
        ("srun -N", "", (None, None)),
        ("", "", (None, None)),
    ],
)
def test_sizes(line: str, slurm: str, expected: tuple[int | None, int | None]) -> None:
    assert size(line.split(), slurm.split()) == expected


def test_sizes_that_are_none() -> None:
    assert size(["srun", "-n", "12", "python"], per_node=4) == (3, 4)
    for line, said in (
        ("srun -N two python", "-N two"),
        ("srun -N 2 -n 15 python", "15 tasks"),
        ("srun -n 12 --gpus-per-node=8 python", "12 tasks"),
        ("srun --gpus-per-node=h100:many python", "--gpus-per-node h100:many"),
    ):
        with pytest.raises(ValueError, match=said):
            size(line.split())


def test_variables() -> None:
    words = shlex.split("A=1 srun --export=ALL,B=2 env C='3 4' python")
    assert environment(words) == {"A": "1", "B": "2", "C": "3 4"}


@pytest.mark.parametrize(
    "rest", ["2>&1 | tee -a log", "> log", ">log", ">> log 2>&1 &", "&> log", "2>/dev/null", "< /dev/null", "&", ";",
             "| grep loss > log", "2> err > out"],
)  # fmt: skip
def test_what_is_the_shells_behind_a_command(rest: str) -> None:
    words = ["torchrun", "pretrain_gpt.py", "--lr", "1"]
    assert without_shell([*words, *rest.split()]) == words


@pytest.mark.parametrize(
    "rest", ["--eod <eos>", "--layout Et|(t|)*2L", "&& echo", "| python other.py", "--x 2"]
)
def test_what_is_not(rest: str) -> None:
    words = ["torchrun", "pretrain_gpt.py", *rest.split()]
    assert without_shell(words) == words


@pytest.mark.parametrize(
    "line", ["nvidia-smi topo -m", "python -m", "-m", "torchrun -m", "srun -N", "bash -c", ""]
)
def test_commands_that_end_in_an_option(line: str) -> None:
    assert launch_of(line.split()) is None


def test_a_script_that_ends_anywhere(tmp_path: Path) -> None:
    """Cut off after any word, and with commands that end in an option: read, or refused."""
    whole = (
        "nvidia-smi topo -m\nexport -n\nset --\nshift\nsource\neval\nexec\nbash -c\n"
        "if [ -n ] && ! [[ -z ]]; then A=(); fi\n"
        "case $X in a) A=1 ;; esac; for i in 1; do ((i++)); done; f() { local B; }; f\n"
        "srun -N 2 -n 16 torchrun --nnodes 2 --nproc-per-node 8 -m dsv3_megatron.train --lr 1 --spec dsv3 -m"
    )
    script = tmp_path / "train.sh"
    for end in range(len(whole) + 1):
        script.write_text(whole[:end])
        try:
            launches, _ = launches_of(script, (), {})
        except RefusedArgument:
            continue
        assert launches[0][1].program == "dsv3_megatron.train"
    assert launches[0][1].nodes == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bash /elsewhere/run.sh 3", "starts another script, /elsewhere/run.sh, which is not beside it"),
        ("python prepare.py --input x", "give the script that starts pretrain_gpt.py"),
        ("$COMMAND --lr 1", "variables of its environment"),
    ],
)
def test_why_there_is_no_trainer(text: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(text + "\n")
    with pytest.raises(RefusedArgument, match=said):
        launches_of(script, (), {})
