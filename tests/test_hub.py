"""The package as a kernel of the Hugging Face Hub: whole under another name, and beside itself."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
# run in an empty folder; what it takes is the folder of a variant, and whether anymask is there too
CALLS = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch.nn.functional import scaled_dot_product_attention
variant, beside = Path(sys.argv[1]), sys.argv[2] == "beside"
sys.path.insert(0, sys.argv[3])
if beside:
    import anymask
else:
    sys.modules["anymask"] = None
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
sys.modules[name] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
assert all(hasattr(kernel, public) for public in kernel.__all__)
q, k, v = (torch.randn(1, 2, 140, 16, requires_grad=True) for _ in range(3))
mask = kernel.causal() & kernel.document(torch.arange(140) // 50)
dense = kernel.pack(mask, q_len=140, kv_len=140).to_dense()
expected = scaled_dot_product_attention(q, k, v, dense)
wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
calls = [(kernel.attention, mask), (torch.compile(kernel.attention, backend="eager", fullgraph=True), mask)]
if beside:
    calls.append((anymask.attention, dense))
for call, given in calls:
    o = call(q, k, v, given)
    torch.testing.assert_close(o, expected)
    for found, right in zip(torch.autograd.grad(o.sin().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(found, right)
o, weights = kernel.flash_attn_forward(torch.nn.Module(), q, k, v, dense, scaling=0.25, dropout=0.0)
torch.testing.assert_close(o.transpose(1, 2), expected)
assert kernel.supports_flash_attn and weights is None
assert beside == hasattr(torch.ops.anymask, "forward")
"""


@pytest.fixture(scope="module")
def hub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub", ROOT / ".ci/hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variants(hub: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.name: path for path in hub.write(tmp_path_factory.mktemp("hub"), "0123abc")}


def test_metadata_name_every_file_by_its_digest(variants: dict[str, Path]) -> None:
    assert set(variants) == {"torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"}
    for name, variant in variants.items():
        found = json.loads((variant / "metadata.json").read_text())
        backend = name.removeprefix("torch-")
        assert (found["name"], found["id"]) == ("anymask", f"_anymask_{backend}_0123abc")
        assert (found["version"], found["backend"], found["python-depends"]) == (0, {"type": backend}, [])
        files = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*.py")}
        assert files.keys() == found["digest"]["files"].keys()
        for path, digest in found["digest"]["files"].items():
            assert hashlib.sha256(files[path].read_bytes()).digest() == b64decode(digest)
        assert "api.py" in files
        assert "backends/hopper/kernels/forward.py" in files
        assert not any("cli" in path or "testing" in path for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["alone", "beside"])
def test_it_works_under_another_name(beside: str, variants: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-W", "ignore", "-c", CALLS, variants["torch-cpu"], beside, ROOT]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernels_import_no_other_package(variants: dict[str, Path]) -> None:
    """The backends that a CPU does not import."""
    for path in variants["torch-cuda"].rglob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line[:1] == ["from"] and line[1].startswith("anymask")], path


def test_an_import_without_a_relative_form_is_refused(hub: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"a/b.py imports anymask by name"):
        hub.converted("import anymask.api\n", "a/b.py", "name")
    assert hub.converted("from anymask.mask import causal\n", "a/b.py", "name") == "from ..mask import causal\n"
    assert hub.converted("from anymask import viz\n", "c.py", "name") == "from . import viz\n"
