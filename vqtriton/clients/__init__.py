"""The quantizers of other projects, with the searches of this one: `vqtriton.patch`."""
