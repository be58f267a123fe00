"""Triton kernels and their launchers. They import torch and Triton only.

One op a file: kernel first, launcher last. Launchers take tensors and a frozen config.
"""

if __name__ != "vqtriton.kernels":
    # loaded as `kernels` each file would exist twice, with two sets of compiled kernels
    raise ImportError(
        f"the kernels folder was imported as {__name__!r}; import it as 'vqtriton.kernels' "
        "(install the project first: pip install -e .)"
    )
