"""``python -m bench.gpu_check``: everything that only a GPU can show, in one run of minutes."""
