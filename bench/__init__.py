"""``python -m bench``: a training step timed and weighed beside vector-quantize-pytorch's."""
