"""The stand-ins: devices, the table and its checks, activation."""

import importlib
import subprocess
import sys

import pytest
import torch

from dsv3_megatron import cpu, patching
from dsv3_megatron.cpu import document, replacements
from dsv3_megatron.cpu.replacements import Replacement, ReplacementError
from dsv3_megatron.patching import repairs


def python(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


CUDA_DEVICES = ["cuda", "cuda:1", 0, torch.device("cuda"), torch.device("cuda", 3)]


@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_every_way_to_name_a_cuda_device_means_the_cpu(device):
    x = torch.arange(4.0, device=device)
    made = [
        x,
        x.to(device),
        x.to(device, torch.bfloat16),
        x.to(device=device, dtype=torch.float64),
        x.cuda(),
        x.new_zeros(2, device=device),
        torch.empty_like(x, device=device),
        torch.tensor([1], device=device),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).to_empty(device=device).weight,
        torch.rand(2, generator=torch.Generator(device=device), device=device),
    ]
    with torch.device(device):
        made.append(torch.ones(2))
    assert [str(tensor.device) for tensor in made] == ["cpu"] * len(made)
    assert made[2].dtype == torch.bfloat16 and made[3].dtype == torch.float64
    assert torch.equal(made[1], torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_other_devices_keep_their_meaning():
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.zeros_like(torch.ones(2)).device.type == "meta"
    assert torch.empty(2, device="meta").to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8


def test_type_reports_the_cuda_name_and_still_converts():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.ones(1).type(torch.int32).dtype == torch.int32


def test_random_state_is_one_generator():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_what_has_no_counterpart_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"torch\.cuda\.CUDAGraph does not exist on CPU"):
        torch.cuda.CUDAGraph()


def rows(*kinds):
    return [
        pytest.param(row, id=f"{row.owner}.{row.names[0]}") for row in replacements.TABLE if row.kind in kinds
    ]


@pytest.mark.parametrize("row", rows("device", "repair"))
def test_every_row_says_of_which_kind_it_is(row):
    assert len(rows("device", "repair")) == len(replacements.TABLE)
    assert row.kind in ("device", "repair") and row.why
    # A repair is a listed patch of some feature, and nothing that only the CPU runtime has.
    assert (row.kind == "repair") == (row.make is None) == (row.patch in patching.modules())
    assert (row.kind == "repair") == (row.patch in repairs.REPAIRS)


def test_a_row_without_a_kind_cannot_be_written():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Replacement("torch.cuda", ("is_available",), lambda original: original, "a test")  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("row", rows("device"))
def test_every_target_exists_and_is_replaced(row):
    owner = replacements._resolve(row.owner)
    for name in row.names:
        original = replacements.originals[f"{row.owner}.{name}"]
        # One stand-in changes the original object and returns it.
        assert (getattr(owner, name) is original) == (name == "CudaRNGStatesTracker")


@pytest.mark.parametrize("name", repairs.REPAIRS)
def test_every_repair_is_installed_once_its_module_is_imported(name):
    importlib.import_module(repairs.targets()[name][0])
    assert next(row.state for row in patching.status() if row.name == name) == "installed"


def test_a_missing_target_is_an_error():
    row = Replacement("device", "torch.cuda", ("no_such_function",), lambda original: original, "a test")
    with pytest.raises(ReplacementError, match=r"torch\.cuda\.no_such_function.*does not have"):
        replacements._apply(row, torch.cuda)


def test_a_missing_megatron_symbol_stops_the_import(tmp_path):
    code = """
import sys
from dsv3_megatron import cpu
from dsv3_megatron.cpu import replacements
row = replacements.Replacement("device", "megatron.core.enums", ("Gone",), lambda original: original, "a test")
replacements.TABLE += (row,)
cpu.activate()
import megatron.core.enums
"""
    result = python(code)
    assert result.returncode == 1 and "ReplacementError" in result.stderr
    assert "megatron.core.enums.Gone" in result.stderr


def test_page_is_up_to_date():
    assert document.page() == document.PAGE.read_text(), "run python -m dsv3_megatron.cpu.document"


def test_activation_is_explicit_and_refused_where_it_would_harm():
    code = """
import sys
import dsv3_megatron.cpu as cpu
assert not cpu.is_active() and "torch" not in sys.modules
import torch

def refusal():
    try:
        cpu.activate()
    except RuntimeError as error:
        assert not cpu.is_active() and torch.empty is empty
        print(error)

empty = torch.empty
sys.modules["megatron.core"] = sys
refusal()
del sys.modules["megatron.core"]
is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
refusal()
torch.cuda.is_available = is_available
cpu.activate()
cpu.activate()
assert cpu.is_active() and torch.cuda.is_available()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    late, gpu = result.stdout.splitlines()
    assert "after Megatron had been imported" in late
    assert "a GPU is visible" in gpu and "CUDA_VISIBLE_DEVICES=''" in gpu


@pytest.mark.parametrize("allowed", [False, True])
def test_transformer_engine_is_hidden_unless_asked_for(tmp_path, allowed):
    (tmp_path / "transformer_engine.py").write_text("here = True")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from dsv3_megatron import cpu
cpu.activate(allow_te={allowed})
try:
    import transformer_engine
    print("imported")
except ModuleNotFoundError:
    print("hidden")
"""
    result = python(code)
    assert result.stdout.strip() == ("imported" if allowed else "hidden"), result.stderr


def test_command_runs_scripts_and_modules(tmp_path):
    (tmp_path / "neighbour.py").write_text("name = 'neighbour'")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, neighbour\n"
        "print(__name__, sys.argv[1:], neighbour.name, torch.zeros(1, device='cuda').device)"
    )
    command = [sys.executable, "-m", "dsv3_megatron.cpu"]
    run = subprocess.run([*command, str(script), "--flag"], capture_output=True, text=True, timeout=120)
    assert run.stdout == "__main__ ['--flag'] neighbour cpu\n", run.stderr
    run = subprocess.run([*command, "-m", "platform", "--terse"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "Linux" in run.stdout
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "usage:" in run.stderr


def test_active_in_this_process():
    assert cpu.is_active()
    cpu.activate()
    if sys.modules.get("transformer_engine", sys) is None:
        with pytest.raises(RuntimeError, match="active already, without Transformer Engine"):
            cpu.activate(allow_te=True)
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    cpu.reset()
    assert torch.cuda.current_stream() is torch.cuda.default_stream() is not stream
