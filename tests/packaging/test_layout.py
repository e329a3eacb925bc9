"""The four folders are importable as `qarl.*`, and Hugging Face's `kernels` stays importable as itself."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("rollout", "trainer", "kernels", "configs")
#: folder or module -> third-party roots that nobody else may import
OWNED = {
    "vllm": lambda file: file.parts[0] in ("rollout",) or file.parts[0] == "kernels",
    "deepspeed": lambda file: file.parts[0] == "trainer",
    "bitsandbytes": lambda file: file.parts[0] == "trainer",
    "wandb": lambda file: file in (Path("qarl/wandb_run.py"), Path("qarl/workspace.py")),
    "wandb_workspaces": lambda file: file == Path("qarl/workspace.py"),
    "ray": lambda file: file in (Path("qarl/actors.py"), Path("qarl/bridge.py"), Path("qarl/cluster.py")),
    "hydra": lambda file: file == Path("qarl/cli.py"),
    "omegaconf": lambda file: file == Path("qarl/cli.py"),
}
#: Modules that must not cost an import of torch: they make `--help`, errors and plans.
LEAN = (
    "qarl.config",
    "qarl.build",
    "qarl.formats",
    "qarl.records",
    "qarl.errors",
    "qarl.plan",
    "qarl.shapes",
    "qarl.train",
    "qarl.doctor",
)


def sources() -> list[Path]:
    files = [f for folder in ("qarl", "rollout", "trainer", "kernels") for f in (ROOT / folder).glob("*.py")]
    return [f.relative_to(ROOT) for f in files]


def imports(file: Path) -> list[str]:
    """Every module that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("name", LINKED)
def test_each_folder_is_a_relative_link_inside_qarl(name):
    link = ROOT / "qarl" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}" and link.is_dir()


@pytest.mark.parametrize("name", ("rollout", "trainer", "kernels", "tests"))
def test_folders_that_would_shadow_other_packages_have_no_init(name):
    assert not (ROOT / name / "__init__.py").exists()


def test_hugging_face_kernels_is_not_shadowed_with_the_root_on_the_path():
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in out.stdout


@pytest.mark.parametrize("file", sources(), ids=str)
def test_layers_import_only_what_they_may(file):
    package = file.parts[0]
    for module in imports(file):
        root = module.split(".")[0]
        if root in OWNED:
            assert OWNED[root](file), f"{file} imports {module}"
        if package == "kernels":
            allowed = ("torch", "triton", "vllm", "qarl.kernels", "qarl")
            assert root in sys.stdlib_module_names or module.startswith(allowed), f"{file} imports {module}"
            core = ("qarl", "qarl.errors", "qarl.kernels")
            assert root != "qarl" or module in core or module.startswith(("qarl.errors.", "qarl.kernels.")), (
                f"{file}: {module}"
            )
        if package == "rollout":
            assert not module.startswith("qarl.trainer"), f"{file} imports {module}"
        if package == "trainer":
            assert not module.startswith("qarl.rollout"), f"{file} imports {module}"


def test_help_errors_and_plans_do_not_import_torch():
    code = f"import sys; import {', '.join(LEAN)}; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["learner.optimiser=1"], 2), (["recipe=quickstart", "plan=true"], 0)],
    ids=["help", "unknown key", "plan"],
)
def test_the_command_line_answers_without_torch(arguments, status, tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["train", *{arguments}]
try:
    runpy.run_module("qarl.train", run_name="__main__")
    status = 0
except SystemExit as exit:
    status = exit.code or 0
assert "torch" not in sys.modules, "torch was imported"
assert status == {status}, status
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", [f for f in sources() if f.parts[0] == "qarl"], ids=str)
def test_only_what_starts_the_parts_imports_them(file):
    """Core modules know learner and engine by the records they exchange."""
    if file.stem not in ("actors", "cluster", "export", "prepare", "trials"):
        assert not [m for m in imports(file) if m.startswith(("qarl.trainer", "qarl.rollout"))]


def test_a_cpu_environment_holds_no_cuda_libraries():
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    names = [str(found.metadata["Name"]).lower() for found in distributions()]
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_a_wheel_holds_the_linked_folders_and_the_recipes(tmp_path):
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("uv is installed by `make env`")
    source = tmp_path / "source"  # setuptools leaves a build folder where it builds
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [str(uv), "build", "--wheel", "--no-build-isolation", "--out-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in (
        "qarl/py.typed",
        "qarl/configs/train.yaml",
        "qarl/configs/recipe/quickstart.yaml",
        "qarl/kernels/w4a16.py",
    ):
        assert name in names, name
    assert not [n for n in names if n.startswith(("kernels/", "trainer/", "rollout/", "tests/"))]
