"""The kernels inside other people's models: `transformers`, `open_clip`, `timm`. Each imports its library, none of the
others, and changes nothing until one of its functions is called.

`accelerate(model)` changes instances, says what it changed, and `restore(model)` undoes it.
"""
