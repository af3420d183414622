"""The Triton slot, through Triton's interpreter: it has to be chosen before Triton is imported, so in a process of
its own."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

SCRIPT = """
    import torch
    import triton
    import triton.language as tl

    from headrace.kernels.cuda import CudaOps
    from headrace.kernels.ops import Ops
    from headrace.kernels.reference import ReferenceOps
    from headrace.kernels.training import TrainingOps

    ReferenceOps.new_in_the_protocol = lambda self, x: (self.name, x)
    triton_ops, reference = CudaOps("cpu"), ReferenceOps("cpu")
    assert triton_ops.new_in_the_protocol(3) == ("reference", 3)
    assert (triton_ops.name, triton_ops.device) == ("cuda", reference.device)
    assert triton_ops.fingerprint().endswith(reference.fingerprint())
    assert all(hasattr(triton_ops, name) for name in {**vars(Ops), **vars(TrainingOps)} if not name.startswith("_"))
    assert triton_ops.fingerprint() != reference.fingerprint()
    torch.manual_seed(0)
    for width in (1, 20, 64, 100, 768):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, weight = torch.randn(7, width) * 3, torch.randn(width).to(dtype)
            y = triton_ops.rms_norm(x, weight, 1e-5)
            torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=2e-6)
            for row in range(7):
                assert torch.equal(triton_ops.rms_norm(x[row:row + 1], weight, 1e-5)[0], y[row])
    wide = torch.randn(4, 3, 40)
    heads = wide[..., :32]
    torch.testing.assert_close(triton_ops.rms_norm(heads, weight[:32], 1e-5),
                               reference.rms_norm(heads, weight[:32], 1e-5), rtol=2e-6, atol=2e-6)
    normed, summed = triton_ops.add_rms_norm(x, -2 * x, weight, 1e-5)
    assert torch.equal(summed, -x) and torch.equal(normed, triton_ops.rms_norm(-x, weight, 1e-5))
    assert triton_ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)

    # A mutant: the row's sum cut in two, as a tile chosen by the number of rows would.
    x = torch.randn(64, 768)
    halves = (x[:, :384].square().sum(1) + x[:, 384:].square().sum(1))[:, None] / 768
    assert not torch.equal(x / torch.sqrt(halves + 1e-5), triton_ops.rms_norm(x, torch.ones(768), 1e-5))
    print("agreed")
"""


def test_rms_norm_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("agreed")
