"""What must hold before any test imports the packages."""

import os

# Triton decides when it decorates a kernel, so when sla_kernels is first imported, whether it will
# interpret or compile it. Without a GPU under test it interprets, and a GPU that is there is
# hidden, so that no tensor on it meets an interpreted kernel.
if os.environ.get("SLA_TEST_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
